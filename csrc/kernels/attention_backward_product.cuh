// What both passes of the gradient do with products in registers.
#pragma once

#include "attention_backward_ring.cuh"
#include "megatron_qwen/attention_backward.h"
#include "multiply.cuh"

namespace megatron_qwen {

constexpr float kLog2OfE = 1.4426950408889634f;

// The operands and results of both passes, of which each has its own tiles.
struct BackwardPass {
  AttentionProblem problem;
  AttentionHeads queries, k, v, grad;
  const float* exponents;
  const float* deltas;
  bool turns_back;
  void* out;         // dk or dq
  void* second_out;  // dv
  CUtensorMap queries_map, k_map, v_map, grad_map;
};

// Numbers per thread of a product [64, 64], and of one with rows of a head.
constexpr int kStepAccumulators = kStepRows / 2;
template <int kHead>
constexpr int kHeadAccumulators = kHead / 2;

// product = a b^T, of 64 rows each.
template <typename T, int kHead>
__device__ __forceinline__ void multiply_heads(float (&product)[kStepAccumulators], std::uint32_t a, std::uint32_t b) {
  using Tile = HeadTile<kStepRows, kHead>;
#pragma unroll
  for (int step = 0; step < kHead / 16; ++step) {
    sm90::multiply<T, false, false>(product, Tile::along_head(a, step), Tile::along_head(b, step), step != 0);
  }
  sm90::commit_multiplications();
}

// sum += a b of a [64, 64] in registers and 64 rows of b; sum = a b without `adds`.
template <typename T, int kHead>
__device__ __forceinline__ void add_rows(float (&sum)[kHeadAccumulators<kHead>],
                                         const std::uint32_t (&a)[kStepRows / 16][4], std::uint32_t b, bool adds) {
  using Tile = HeadTile<kStepRows, kHead>;
#pragma unroll
  for (int step = 0; step < kStepRows / 16; ++step) {
    sm90::multiply_registers<T, true>(sum, a[step], Tile::along_rows(b, step), adds || step != 0);
  }
  sm90::commit_multiplications();
}

// cos and sin of two neighbouring numbers of a half.
struct Angles {
  float cos[2], sin[2];
};

__device__ __forceinline__ Angles angles_at(const AttentionTables& tables, int position, int half, int column) {
  const bool known = position >= 0 && position < tables.rows;
  const std::int64_t element = (known ? std::int64_t{position} * half : 0) + column;
  Angles angles;
  unpack(load<2>(tables.cos + element), angles.cos);
  unpack(load<2>(tables.sin + element), angles.sin);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!known) angles.cos[i] = angles.sin[i] = NAN;
  }
  return angles;
}

// Turns both of the thread's rows back by the angles that angles_of(which row, column) returns. Numbers d and d + D / 2
// of a row are the same thread's.
template <int kHead, typename AnglesOf>
__device__ __forceinline__ void turn_back(float (&rows)[kHeadAccumulators<kHead>], AnglesOf&& angles_of) {
  constexpr int kApart = kHeadAccumulators<kHead> / 2;
#pragma unroll
  for (int j = 0; j < kHead / 16; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Angles angles = angles_of(h, 8 * j + 2 * (static_cast<int>(threadIdx.x) % 4));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& first = rows[4 * j + 2 * h + i];
        float& second = rows[4 * j + 2 * h + i + kApart];
        const float turned = first * angles.cos[i] + second * angles.sin[i];
        second = second * angles.cos[i] - first * angles.sin[i];
        first = turned;
      }
    }
  }
}

// Writes the thread's rows, the second 8 behind the first; all threads of a warp call it. out: number 0 of the first.
template <typename T, int kHead>
__device__ __forceinline__ void store_rows(T* out, std::int64_t row_stride, const bool (&exists)[2],
                                           const float (&rows)[kHeadAccumulators<kHead>]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int block = 0; block < kHead / 32; ++block) {
      float values[8];
      gather_columns(rows, block, h, values);
      if (!exists[h]) continue;
      store_whole(out + 8 * h * row_stride + 32 * block + 8 * (static_cast<int>(threadIdx.x) % 4), pack<T>(values));
    }
  }
}

}  // namespace megatron_qwen
