// What forward and backward of RMSNorm share in device code. A thread block works on one row at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace megatron_qwen {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sums over the threads of a block: the same bits in every thread and every time, at one barrier each. Consecutive sums
// use two scratch arrays in turn, so that none is overwritten while a slower warp still reads it.
class BlockSum {
 public:
  using Scratch = float[2][kMostThreads / kWarp];

  __device__ explicit BlockSum(Scratch& scratch) : scratch_(scratch) {}

  __device__ float operator()(float value) {
    float* here = scratch_[turn_];
    turn_ ^= 1;
    value = warp_sum(value);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane == 0) here[threadIdx.x / kWarp] = value;
    __syncthreads();
    return warp_sum(lane < static_cast<int>(blockDim.x) / kWarp ? here[lane] : 0.0f);
  }

 private:
  Scratch& scratch_;
  int turn_ = 0;
};

// Calls function(index, column) for this thread's kVectors vectors of a row that the registers of the block hold.
template <int kWidth, int kVectors, typename Function>
__device__ __forceinline__ void for_held(int hidden, Function function) {
#pragma unroll
  for (int index = 0; index < kVectors; ++index) {
    const int column = (index * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kWidth;
    if (column < hidden) function(index, column);
  }
}

}  // namespace megatron_qwen
