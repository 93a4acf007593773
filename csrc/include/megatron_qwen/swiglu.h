// SwiGLU of the packed output of a gate-and-up projection: out = silu(gate) * up, and its gradient.
#pragma once

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

// Strides count elements; neighbouring columns are neighbours in memory.
struct SwiGLUForwardParams {
  const void* packed;          // [rows, 2 width], gate first
  void* out;                   // [rows, width], contiguous
  std::int64_t rows;           // >= 0
  std::int64_t width;          // >= 0
  std::int64_t packed_stride;  // from row to row
  DType dtype;
  void* stream;  // cudaStream_t
};

struct SwiGLUBackwardParams {
  const void* grad;    // [rows, width], of out
  const void* packed;  // [rows, 2 width]
  void* grad_packed;   // [rows, 2 width], contiguous
  std::int64_t rows;   // >= 0
  std::int64_t width;  // >= 0
  std::int64_t grad_stride;
  std::int64_t packed_stride;
  DType dtype;
  void* stream;  // cudaStream_t
};

// Throw std::invalid_argument naming the offending value. Need no device.
void check(const SwiGLUForwardParams& params);
void check(const SwiGLUBackwardParams& params);

// Enqueue one kernel; none where there is nothing to compute. Throw as check() does, and std::runtime_error with CUDA's
// own words if the launch fails.
void swiglu_forward(const SwiGLUForwardParams& params);
void swiglu_backward(const SwiGLUBackwardParams& params);

}  // namespace megatron_qwen
