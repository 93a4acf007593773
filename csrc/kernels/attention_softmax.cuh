// The online softmax of two rows per thread, of products [64, 128] in registers. Logits are powers of two:
// exp(scale x) = exp2(log2(e) scale x), and scales are above 0, so that the largest is looked for before scaling.
#pragma once

#include <cmath>

#include "attention_blocks.cuh"
#include "megatron_qwen/sm90/wgmma.cuh"

namespace megatron_qwen {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Of a product [64, kAttentionTileRows].
constexpr int kLogits = kAttentionTileRows / 2;
using Logits = float[kLogits];

// Logits of keys behind a row, or at and beyond `end`, become -inf. `key` is the first of the block, `position` that of
// the first of this thread's rows, `first` that of the warpgroup's.
__device__ __forceinline__ void mask_logits(Logits& logits, int key, int end, int first, int position) {
  if (key + kAttentionTileRows <= min(first + 1, end)) return;
  const int column = key + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int last = min(position + 8 * half, end - 1) - column;
#pragma unroll
    for (int i = 0; i < kLogits / 4; ++i) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (8 * i + part > last) logits[4 * i + 2 * half + part] = -INFINITY;
      }
    }
  }
}

// Over the four threads that share a row.
__device__ __forceinline__ float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// What is kept of the keys so far.
struct SoftmaxRows {
  float scale[2];  // log2(e) times that of the logits
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};  // of this thread's columns

  // Turns logits into probabilities, up to a factor per row; `decay` is what becomes of that of earlier keys.
  __device__ __forceinline__ void fold(Logits& logits, float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < kLogits / 4; ++i) {
        most = fmaxf(most, fmaxf(logits[4 * i + 2 * half], logits[4 * i + 2 * half + 1]));
      }
      const float now = fmaxf(largest[half], largest_of_row(most) * scale[half]);
      // A row that has not met a key: exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
      const float finite = now == -INFINITY ? 0.0f : now;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kLogits / 4; ++i) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float& logit = logits[4 * i + 2 * half + part];
          logit = sm90::exp2_fast(fmaf(logit, scale[half], -finite));
          sum += logit;
        }
      }
      decay[half] = sm90::exp2_fast(largest[half] - finite);
      total[half] = fmaf(total[half], decay[half], sum);
      largest[half] = now;
    }
  }
};

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&product)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) product[i] *= factor[i / 2 % 2];
}

}  // namespace megatron_qwen
