// y = x r w with r = 1 / sqrt(mean(x^2) + eps), of x or of x + residual.
#pragma once

#include <cstdint>

#include "megatron_qwen/rms_norm.h"
#include "rms_norm.cuh"
#include "vector.cuh"

namespace megatron_qwen {

// Elements of a row per thread: 1024 threads hold the longest.
constexpr int kHeldForward = 16;

// Rows of 16-byte vectors: read once, held in registers, written once.
template <typename T, bool kAdds>
__global__ __launch_bounds__(kMostThreads) void rms_norm_forward_kernel(const RMSNormForwardParams params) {
  constexpr int kWidth = kPerVector<T>;
  constexpr int kVectors = kHeldForward / kWidth;
  __shared__ BlockSum::Scratch scratch;
  BlockSum block_sum(scratch);
  const int hidden = static_cast<int>(params.hidden);
  for (std::int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(params.x) + row * params.x_stride;
    const T* residual_row = static_cast<const T*>(params.residual) + row * params.residual_stride;
    T* sum_row = static_cast<T*>(params.sum) + row * params.hidden;
    T* y_row = static_cast<T*>(params.y) + row * params.hidden;
    Vector<T, kWidth> x[kVectors], residual[kVectors];
    for_held<kWidth, kVectors>(hidden, [&](int index, int column) {
      x[index] = load_once<kWidth>(x_row + column);
      if constexpr (kAdds) residual[index] = load_once<kWidth>(residual_row + column);
    });
    float squares = 0.0f;
    for_held<kWidth, kVectors>(hidden, [&](int index, int column) {
      float value[kWidth];
      unpack(x[index], value);
      if constexpr (kAdds) {
        float added[kWidth];
        unpack(residual[index], added);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) value[i] += added[i];
        x[index] = pack<T>(value);
        store(sum_row + column, x[index]);
        unpack(x[index], value);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares += value[i] * value[i];
    });
    const float inverse_rms[1] = {rsqrtf(block_sum(squares) / hidden + params.eps)};
    if (threadIdx.x == 0) store(params.inverse_rms + row, pack<float>(inverse_rms));
    for_held<kWidth, kVectors>(hidden, [&](int index, int column) {
      float value[kWidth], weight[kWidth];
      unpack(x[index], value);
      load_floats(params.weight, params.weight_dtype, column, weight);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) value[i] = value[i] * inverse_rms[0] * weight[i];
      store(y_row + column, pack<T>(value));
    });
  }
}

// Rows of any length and alignment, element by element; the second reading comes from the caches.
template <typename T, bool kAdds>
__global__ __launch_bounds__(kMostThreads) void rms_norm_forward_scalar_kernel(const RMSNormForwardParams params) {
  __shared__ BlockSum::Scratch scratch;
  BlockSum block_sum(scratch);
  const int hidden = static_cast<int>(params.hidden);
  const int threads = static_cast<int>(blockDim.x);
  for (std::int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* x_row = static_cast<const T*>(params.x) + row * params.x_stride;
    const T* residual_row = static_cast<const T*>(params.residual) + row * params.residual_stride;
    T* sum_row = static_cast<T*>(params.sum) + row * params.hidden;
    T* y_row = static_cast<T*>(params.y) + row * params.hidden;
    float squares = 0.0f;
    for (int column = static_cast<int>(threadIdx.x); column < hidden; column += threads) {
      float value[1], added[1];
      unpack(load_once<1>(x_row + column), value);
      if constexpr (kAdds) {
        unpack(load_once<1>(residual_row + column), added);
        value[0] += added[0];
        const auto rounded = pack<T>(value);
        store(sum_row + column, rounded);
        unpack(rounded, value);
      }
      squares += value[0] * value[0];
    }
    const float inverse_rms[1] = {rsqrtf(block_sum(squares) / hidden + params.eps)};
    if (threadIdx.x == 0) store(params.inverse_rms + row, pack<float>(inverse_rms));
    const T* normed_row = kAdds ? sum_row : x_row;
    for (int column = static_cast<int>(threadIdx.x); column < hidden; column += threads) {
      float value[1], weight[1];
      unpack(load_once<1>(normed_row + column), value);
      load_floats(params.weight, params.weight_dtype, column, weight);
      value[0] = value[0] * inverse_rms[0] * weight[0];
      store(y_row + column, pack<T>(value));
    }
  }
}

}  // namespace megatron_qwen
