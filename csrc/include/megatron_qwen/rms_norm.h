// RMSNorm over rows, y = x r w with r = 1 / sqrt(mean(x^2) + eps), optionally of x + residual, and its gradient.
#pragma once

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

constexpr std::int64_t kRMSNormLargestHidden = 16384;

// Strides count elements; neighbouring columns are neighbours in memory, and what has no stride is contiguous.
struct RMSNormForwardParams {
  const void* x;          // [rows, hidden]
  const void* residual;   // [rows, hidden], or null: the norm is of x alone
  const void* weight;     // [hidden], of weight_dtype
  void* y;                // [rows, hidden]
  void* sum;              // [rows, hidden]: x + residual, rounded to dtype; null where residual is
  float* inverse_rms;     // [rows]
  std::int64_t rows;      // >= 0
  std::int64_t hidden;    // 1 to kRMSNormLargestHidden
  std::int64_t x_stride;  // from row to row
  std::int64_t residual_stride;
  float eps;    // >= 0
  DType dtype;  // of x, residual, y, sum
  DType weight_dtype;
  void* stream;  // cudaStream_t
};

struct RMSNormBackwardParams {
  const void* grad;           // [rows, hidden], of y
  const void* grad_sum;       // [rows, hidden], added to grad_x before it is rounded; or null
  const void* x;              // [rows, hidden]: what was normalised
  const void* weight;         // [hidden], of weight_dtype
  const float* inverse_rms;   // [rows], of the forward pass
  void* grad_x;               // [rows, hidden]
  void* grad_weight;          // [hidden], of weight_dtype
  float* partial;             // [num_programs, hidden], scratch
  std::int64_t rows;          // >= 0; 0 returns without a launch
  std::int64_t hidden;        // 1 to kRMSNormLargestHidden
  std::int64_t x_stride;      // from row to row
  std::int64_t num_programs;  // thread blocks that share the rows; 1 to rows
  DType dtype;                // of grad, grad_sum, x, grad_x
  DType weight_dtype;
  void* stream;  // cudaStream_t
};

// Throw std::invalid_argument naming the offending value. Need no device.
void check(const RMSNormForwardParams& params);
void check(const RMSNormBackwardParams& params);

// Enqueues one kernel. Throws as check() does, and std::runtime_error with CUDA's own words if the launch fails.
void rms_norm_forward(const RMSNormForwardParams& params);

// Enqueues two kernels: grad_x with partial sums of grad_weight per thread block, then their sum in a fixed order.
// The same params, num_programs included, give the same bits.
void rms_norm_backward(const RMSNormBackwardParams& params);

// The num_programs to take: at most `rows`, and as many thread blocks of the first kernel as the current device holds
// at once. `adds`: with grad_sum.
std::int64_t rms_norm_backward_programs(std::int64_t rows, std::int64_t hidden, DType dtype, bool adds);

}  // namespace megatron_qwen
