// Grouped GEMMs of a mixture of experts on sm_90a: rows sorted by expert, each group with a matrix of its own, and the
// shared expert as one more group of every launch.
// T tokens, R routed rows, E experts, H hidden size, F and Fs widths of a routed and of the shared expert. A flat
// buffer of width F holds [R, F] and then [T, Fs]. 16-bit dtypes; H, F and Fs are multiples of 8, all addresses of 16
// bytes.
#pragma once

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

// Matrices of a launch, the shared expert's among them: each has a TMA descriptor of 128 bytes in the parameters of the
// kernel, which may be 32764 bytes.
constexpr std::int64_t kMostGroups = 192;

// What all launches share. Rows R .. R + T are the shared expert's.
struct ExpertGroups {
  const std::int64_t* offsets;  // [E + 1] on the device: where each expert's rows begin, and R
  const std::int32_t* tokens;   // [R + T], the row of x behind each row
  std::int64_t experts;         // E >= 1
  std::int64_t routed;          // R >= 1, below 2^31
  std::int64_t shared_tokens;   // T, or 0 without a shared expert
  std::int64_t x_rows;          // of x and dy
  std::int64_t size;            // H
  std::int64_t width;           // F
  std::int64_t shared_width;    // Fs, or 0
  DType dtype;
  void* stream;  // cudaStream_t
};

// packed = x W1^T and hidden = silu(gate) * up; either may be missing.
struct GroupedUpParams {
  ExpertGroups groups;
  const void* x;           // [x_rows, H]
  const void* const* fc1;  // E (+ 1) addresses of [2F, H], gate then up
  void* packed;            // flat, of width 2F; or null
  void* hidden;            // flat, of width F; or null
};

// out = a W, its rows weighted.
struct GroupedDownParams {
  ExpertGroups groups;
  const void* a;                // flat, of width factor F
  const void* const* matrices;  // W [factor F, H], or kept as [H, F] if transposed
  const float* row_weights;     // [R + T], or null
  void* out;                    // [R + T, H]
  std::int64_t factor;          // 1 for W2, 2 for W1
  bool transposed;
};

// From d = dy W2: the gradient of packed, the weighted activation, and partial sums of the rows' weights' gradients.
struct GroupedActivationBackwardParams {
  ExpertGroups groups;
  const void* grad;           // dy [x_rows, H]
  const void* const* fc2;     // E (+ 1) addresses of [H, F]
  const float* row_weights;   // [R + T]
  const std::int64_t* slots;  // [R], where each row's partial sums go; null: in its own place
  const void* packed;         // flat, of width 2F
  void* grad_packed;          // flat, of width 2F
  void* hidden;               // flat, of width F
  float* partial;             // [columns, R] and then [shared columns, T], see activation_backward_columns
};

// Per group: out = flat^T x [factor F, H], or x^T flat [H, factor F] if transposed. A sum over the group's rows, in
// order.
struct GroupedWeightGradientParams {
  ExpertGroups groups;
  const void* flat;     // of width factor F
  const void* x;        // [x_rows, H]
  void* const* out;     // E (+ 1) addresses
  std::int64_t factor;  // 1 or 2
  bool transposed;
  bool adds;        // to what is in out
  DType out_dtype;  // of the inputs, or fp32
};

// Columns of partial sums for an expert of this width.
std::int64_t activation_backward_columns(std::int64_t width);

// Throw std::invalid_argument naming the offending value. Need no device.
void check(const GroupedUpParams& params);
void check(const GroupedDownParams& params);
void check(const GroupedActivationBackwardParams& params);
void check(const GroupedWeightGradientParams& params);

// Enqueue one kernel. Throw as check() does, and std::runtime_error with CUDA's own words if the launch fails, or if
// the device is not an sm_90.
void grouped_up(const GroupedUpParams& params);
void grouped_down(const GroupedDownParams& params);
void grouped_activation_backward(const GroupedActivationBackwardParams& params);
void grouped_weight_gradient(const GroupedWeightGradientParams& params);

}  // namespace megatron_qwen
