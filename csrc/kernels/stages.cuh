// The ring of tiles in shared memory between the warps that copy and those that multiply.
#pragma once

#include "megatron_qwen/sm90/async_copy.cuh"
#include "operand_tile.cuh"

namespace megatron_qwen {

// A warpgroup copies, two multiply 64 rows of the tile each.
constexpr int kCopyThreads = 128;
constexpr int kMultiplyThreads = 256;
constexpr int kGemmThreads = kCopyThreads + kMultiplyThreads;
// A block is launched with 168 registers per thread, and its warpgroups share them out anew. Gathering leaves most to
// the multiplications; with TMA the schedule's divisions are all there is, and 40 would spill.
template <bool kGathers>
constexpr int kCopyRegisters = kGathers ? 40 : 56;
template <bool kGathers>
constexpr int kMultiplyRegisters = kGathers ? 232 : 224;

constexpr int kStages = 4;
constexpr int kStagesSharedBytes = kStages * kStageBytes + 2 * kStages * static_cast<int>(sizeof(sm90::Barrier));
static_assert(kStagesSharedBytes <= 232448, "a block of sm_90 has 227 KiB of shared memory");

// A place in the ring, and how often (mod 2) it was passed.
struct Turn {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage != kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

class Stages {
 public:
  // All threads call it. `copy_arrivals` come to the barrier of a full stage.
  __device__ __forceinline__ explicit Stages(std::uint32_t copy_arrivals)
      : memory_(sm90::dynamic_shared()), barriers_(reinterpret_cast<sm90::Barrier*>(memory_ + kStages * kStageBytes)) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        sm90::initialize(full(stage), copy_arrivals);
        sm90::initialize(empty(stage), kMultiplyThreads / 32);
      }
      sm90::fence_initialized_barriers();
    }
    __syncthreads();
  }

  __device__ __forceinline__ sm90::Barrier* full(int stage) const { return barriers_ + stage; }
  __device__ __forceinline__ sm90::Barrier* empty(int stage) const { return barriers_ + kStages + stage; }
  __device__ __forceinline__ unsigned char* left(int stage) const { return memory_ + stage * kStageBytes; }
  __device__ __forceinline__ unsigned char* right(int stage) const { return left(stage) + kLeftBytes; }

 private:
  unsigned char* memory_;
  sm90::Barrier* barriers_;
};

// Arrivals of a thread's cp.async at full stages. They wait for the copies of two stages ago, so that those of the
// newest stages are under way meanwhile; the fence in between is what lets wgmma read them.
class LateArrivals {
 public:
  __device__ __forceinline__ explicit LateArrivals(const Stages& stages) : stages_(stages) {}

  // After the copies into the next stage were issued.
  __device__ __forceinline__ void issued() {
    sm90::commit_copies();
    if (++pending_ <= kLag) return;
    sm90::wait_for_copies<kLag>();
    arrive_oldest();
  }

  __device__ __forceinline__ void finish() {
    sm90::wait_for_copies<0>();
    while (pending_ > 0) arrive_oldest();
  }

 private:
  static constexpr int kLag = 2;
  static_assert(kLag < kStages, "the copies of a stage would wait for that stage to be multiplied");

  __device__ __forceinline__ void arrive_oldest() {
    sm90::fence_for_async_proxy();
    sm90::arrive(stages_.full(oldest_));
    oldest_ = oldest_ + 1 == kStages ? 0 : oldest_ + 1;
    --pending_;
  }

  const Stages& stages_;
  int oldest_ = 0;
  int pending_ = 0;
};

}  // namespace megatron_qwen
