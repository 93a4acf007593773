// What the multiplying warpgroups do: sums over the stages, and the columns a thread has of the product.
#pragma once

#include "megatron_qwen/sm90/wgmma.cuh"
#include "stages.cuh"

namespace megatron_qwen {

using Accumulators = float[sm90::kAccumulators];

// product = sum over `blocks` stages of left right, 64 terms each. One group of multiplications is always under way, so
// a stage is handed back one block later.
template <typename T, bool kTransposedLeft, bool kTransposedRight>
__device__ __forceinline__ void multiply_stages(Accumulators& product, std::int64_t blocks, Turn& turn,
                                                const Stages& stages) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool releases = threadIdx.x % 32 == 0;
  int previous = 0;
  for (std::int64_t block = 0; block < blocks; ++block, turn.advance()) {
    sm90::wait(stages.full(turn.stage), turn.parity);
    const std::uint32_t left = sm90::shared_address(stages.left(turn.stage)) + warpgroup * kBoxBytes;
    const std::uint32_t right = sm90::shared_address(stages.right(turn.stage));
    sm90::pin(product);
    sm90::begin_multiplications();
#pragma unroll
    for (int step = 0; step < kTileDepth / 16; ++step) {
      sm90::multiply<T, kTransposedLeft, kTransposedRight>(
          product, operand_descriptor(left + step * kStepBytes<kTransposedLeft>),
          operand_descriptor(right + step * kStepBytes<kTransposedRight>), block != 0 || step != 0);
    }
    sm90::commit_multiplications();
    sm90::wait_for_multiplications<1>();
    sm90::pin(product);
    if (block != 0 && releases) sm90::arrive(stages.empty(previous));
    previous = turn.stage;
  }
  sm90::wait_for_multiplications<0>();
  sm90::pin(product);
  if (blocks != 0 && releases) sm90::arrive(stages.empty(previous));
}

// Rows of the tile that this thread has numbers of: this one, and the one 8 below.
__device__ __forceinline__ int first_row_of_thread() {
  const int thread = static_cast<int>(threadIdx.x) - kCopyThreads;
  return thread / 32 * 16 + thread % 32 / 4;
}

// 8 neighbouring columns of one of the thread's rows, from 32 columns of which the four threads of a quad have two in
// each 8: thread q gets columns 32 block + 8 q and on. All threads of a warp call it.
template <int kCount>
__device__ __forceinline__ void gather_columns(const float (&product)[kCount], int block, int half,
                                               float (&columns)[8]) {
  float pairs[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i][0] = product[(block * 4 + i) * 4 + 2 * half];
    pairs[i][1] = product[(block * 4 + i) * 4 + 2 * half + 1];
  }
  // The transpose of a 4 x 4 matrix whose rows are threads: 2 x 2 blocks, then within them.
#pragma unroll
  for (int distance = 2; distance >= 1; distance /= 2) {
    const bool upper = (threadIdx.x & static_cast<unsigned int>(distance)) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const float sent = upper ? pairs[i][part] : pairs[i + distance][part];
        const float received = __shfl_xor_sync(0xffffffffu, sent, distance);
        if (upper) {
          pairs[i][part] = received;
        } else {
          pairs[i + distance][part] = received;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    columns[2 * i] = pairs[i][0];
    columns[2 * i + 1] = pairs[i][1];
  }
}

}  // namespace megatron_qwen
