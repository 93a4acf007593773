// With n = x r: grad_x = r (grad w - n mean(grad w n)) + grad_sum, grad_weight = sum over rows of grad n.
#pragma once

#include <cstdint>

#include "megatron_qwen/rms_norm.h"
#include "rms_norm.cuh"
#include "vector.cuh"

namespace megatron_qwen {

// At 128 registers per thread.
constexpr int kBackwardThreads = 512;
// Elements of a row per thread; the second for rows of more than 8192.
constexpr int kHeldBackward = 16;
constexpr int kHeldOfLong = 32;

// Rows of 16-byte vectors: read once, held in registers, written once.
template <typename T, int kHeld, bool kAdds>
__global__ __launch_bounds__(kBackwardThreads) void rms_norm_backward_kernel(const RMSNormBackwardParams params) {
  constexpr int kWidth = kPerVector<T>;
  constexpr int kVectors = kHeld / kWidth;
  // Long rows leave no registers for it before the reduction.
  constexpr bool kHoldsGradSum = kAdds && kHeld < kHeldOfLong;
  __shared__ BlockSum::Scratch scratch;
  BlockSum block_sum(scratch);
  const int hidden = static_cast<int>(params.hidden);
  float grad_weight[kVectors][kWidth] = {};
  for (std::int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* grad_row = static_cast<const T*>(params.grad) + row * params.hidden;
    const T* grad_sum_row = static_cast<const T*>(params.grad_sum) + row * params.hidden;
    const T* x_row = static_cast<const T*>(params.x) + row * params.x_stride;
    T* grad_x_row = static_cast<T*>(params.grad_x) + row * params.hidden;
    float inverse_rms[1];
    unpack(load<1>(params.inverse_rms + row), inverse_rms);
    Vector<T, kWidth> grad[kVectors], grad_sum[kVectors], x[kVectors];
    for_held<kWidth, kVectors>(hidden, [&](int index, int column) {
      grad[index] = load_once<kWidth>(grad_row + column);
      x[index] = load_once<kWidth>(x_row + column);
      if constexpr (kHoldsGradSum) grad_sum[index] = load_once<kWidth>(grad_sum_row + column);
    });
    float projection = 0.0f;
    for_held<kWidth, kVectors>(hidden, [&](int index, int column) {
      float grad_y[kWidth], normal[kWidth], weight[kWidth];
      unpack(grad[index], grad_y);
      unpack(x[index], normal);
      load_floats(params.weight, params.weight_dtype, column, weight);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        normal[i] *= inverse_rms[0];
        grad_weight[index][i] += grad_y[i] * normal[i];
        projection += grad_y[i] * weight[i] * normal[i];
      }
    });
    projection = block_sum(projection) / hidden;
    for_held<kWidth, kVectors>(hidden, [&](int index, int column) {
      if constexpr (kAdds && !kHoldsGradSum) grad_sum[index] = load_once<kWidth>(grad_sum_row + column);
      float grad_y[kWidth], normal[kWidth], weight[kWidth], grad_x[kWidth];
      unpack(grad[index], grad_y);
      unpack(x[index], normal);
      // From the L1 cache again: registers that hold it would cost rows on their way.
      load_floats(params.weight, params.weight_dtype, column, weight);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        grad_x[i] = (grad_y[i] * weight[i] - normal[i] * inverse_rms[0] * projection) * inverse_rms[0];
      }
      if constexpr (kAdds) {
        float added[kWidth];
        unpack(grad_sum[index], added);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) grad_x[i] += added[i];
      }
      store(grad_x_row + column, pack<T>(grad_x));
    });
  }
  float* partial_row = params.partial + std::int64_t{blockIdx.x} * params.hidden;
  for_held<kWidth, kVectors>(
      hidden, [&](int index, int column) { store(partial_row + column, pack<float>(grad_weight[index])); });
}

// Rows of any length and alignment, element by element. The second reading comes from the caches, and there, too, the
// block keeps its row of partial: a column belongs to one thread, so nothing is shared.
template <typename T, bool kAdds>
__global__ __launch_bounds__(kMostThreads) void rms_norm_backward_scalar_kernel(const RMSNormBackwardParams params) {
  __shared__ BlockSum::Scratch scratch;
  BlockSum block_sum(scratch);
  const int hidden = static_cast<int>(params.hidden);
  const int threads = static_cast<int>(blockDim.x);
  float* partial_row = params.partial + std::int64_t{blockIdx.x} * params.hidden;
  for (std::int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* grad_row = static_cast<const T*>(params.grad) + row * params.hidden;
    const T* grad_sum_row = static_cast<const T*>(params.grad_sum) + row * params.hidden;
    const T* x_row = static_cast<const T*>(params.x) + row * params.x_stride;
    T* grad_x_row = static_cast<T*>(params.grad_x) + row * params.hidden;
    float inverse_rms[1];
    unpack(load<1>(params.inverse_rms + row), inverse_rms);
    float projection = 0.0f;
    for (int column = static_cast<int>(threadIdx.x); column < hidden; column += threads) {
      float grad_y[1], normal[1], weight[1], grad_weight[1] = {0.0f};
      unpack(load_once<1>(grad_row + column), grad_y);
      unpack(load_once<1>(x_row + column), normal);
      load_floats(params.weight, params.weight_dtype, column, weight);
      if (row != blockIdx.x) unpack(load_once<1>(partial_row + column), grad_weight);
      normal[0] *= inverse_rms[0];
      grad_weight[0] += grad_y[0] * normal[0];
      store(partial_row + column, pack<float>(grad_weight));
      projection += grad_y[0] * weight[0] * normal[0];
    }
    projection = block_sum(projection) / hidden;
    for (int column = static_cast<int>(threadIdx.x); column < hidden; column += threads) {
      float grad_y[1], normal[1], weight[1], added[1] = {0.0f}, grad_x[1];
      unpack(load_once<1>(grad_row + column), grad_y);
      unpack(load_once<1>(x_row + column), normal);
      load_floats(params.weight, params.weight_dtype, column, weight);
      if constexpr (kAdds) unpack(load_once<1>(grad_sum_row + column), added);
      grad_x[0] = (grad_y[0] * weight[0] - normal[0] * inverse_rms[0] * projection) * inverse_rms[0] + added[0];
      store(grad_x_row + column, pack<T>(grad_x));
    }
  }
}

}  // namespace megatron_qwen
