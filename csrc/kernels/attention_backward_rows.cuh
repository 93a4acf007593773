// What happens to rows before the passes of the gradient: rotated copies, and two numbers per row and head. A thread
// has 16 bytes of a row, or of each of its halves.
#pragma once

#include <cmath>

#include "attention_tiles.cuh"
#include "megatron_qwen/attention_backward.h"
#include "vector.cuh"

namespace megatron_qwen {

constexpr int kRowThreads = 256;

struct RowAndHead {
  std::int64_t batch, row, head;
};

// Rows and heads in order, the head fastest.
__device__ __forceinline__ RowAndHead row_and_head(std::int64_t at, std::int64_t rows, std::int64_t heads) {
  const std::int64_t row = at / heads, batch = row / rows;
  return {batch, row - batch * rows, at - row * heads};
}

__device__ __forceinline__ std::int64_t place_of(const AttentionHeads& heads, const RowAndHead& at) {
  return at.batch * heads.batch_stride + at.row * heads.row_stride + at.head * heads.head_stride;
}

template <typename T>
__device__ __forceinline__ void load_8(const void* base, std::int64_t element, float (&values)[8]) {
  unpack(load<8>(static_cast<const T*>(base) + element), values);
}

template <typename T>
__global__ __launch_bounds__(kRowThreads) void attention_rotate_kernel(const AttentionRotateParams params) {
  const int half = static_cast<int>(params.head_dim) / 2, threads = half / 8;
  const std::int64_t index = std::int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  const int column = static_cast<int>(index % threads) * 8;
  const std::int64_t item = index / threads, items = params.batch * params.rows * params.heads;
  if (item >= items) return;
  const RowAndHead at = row_and_head(item, params.rows, params.heads);
  const auto position =
      static_cast<int>(params.positions != nullptr ? __ldg(params.positions + at.row) : params.start + at.row);
  const int stride = static_cast<int>(params.chunks.stride);
  // Rows before position 0 meet no keys: any angle of the tables will do.
  const int within = position < 0 ? 0 : position % stride;
  float first[8], second[8];
  load_8<T>(params.x.data, place_of(params.x, at) + column, first);
  load_8<T>(params.x.data, place_of(params.x, at) + half + column, second);
  T* out = static_cast<T*>(params.out) + item * params.head_dim + column;
  for (int segment = 3 - static_cast<int>(params.copies); segment < 3; ++segment) {
    const int angle = query_position(segment, within, params.chunks);
    const bool known = angle < params.tables.rows;
    float cos[8], sin[8], low[8], high[8];
    unpack(load<8>(params.tables.cos + (known ? std::int64_t{angle} * half : 0) + column), cos);
    unpack(load<8>(params.tables.sin + (known ? std::int64_t{angle} * half : 0) + column), sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      low[i] = known ? first[i] * cos[i] - second[i] * sin[i] : NAN;
      high[i] = known ? second[i] * cos[i] + first[i] * sin[i] : NAN;
    }
    store(out, pack<T>(low));
    store(out + half, pack<T>(high));
    out += items * params.head_dim;
  }
}

template <typename T>
__global__ __launch_bounds__(kRowThreads) void attention_row_terms_kernel(const AttentionRowTermsParams params) {
  const int threads = static_cast<int>(params.head_dim) / 8;
  const std::int64_t index = std::int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  const int column = static_cast<int>(index % threads) * 8;
  const std::int64_t items = params.batch * params.rows * params.heads;
  const bool exists = index / threads < items;
  const RowAndHead at = row_and_head(exists ? index / threads : 0, params.rows, params.heads);
  float grad[8], output[8], delta = 0.0f;
  load_8<T>(params.grad.data, place_of(params.grad, at) + column, grad);
  load_8<T>(params.output.data, place_of(params.output, at) + column, output);
#pragma unroll
  for (int i = 0; i < 8; ++i) delta += grad[i] * output[i];
  for (int distance = threads / 2; distance >= 1; distance /= 2) {
    delta += __shfl_xor_sync(0xffffffffu, delta, distance);
  }
  if (!exists || column != 0) return;
  constexpr float kLog2E = 1.4426950408889634f;
  const std::int64_t place = (at.batch * params.heads + at.head) * params.rows + at.row;
  const float lse = __ldg(params.lse + place);
  plain_store(params.deltas + place, delta);
  // exp2 of anything less than +inf is 0.
  plain_store(params.exponents + place, lse == -INFINITY ? INFINITY : lse * kLog2E);
}

}  // namespace megatron_qwen
