// The second stage of gradients that sum over tokens: partial sums of each block, added in a fixed order.
// The first stage writes one fp32 row per block; without atomics the result does not depend on which block ends first.
#pragma once

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

struct ColumnSumParams {
  const float* partial;  // [rows, columns], contiguous
  void* out;             // [columns] of `dtype`
  std::int64_t rows;     // >= 1
  std::int64_t columns;  // >= 0; 0 returns without a launch
  DType dtype;
  void* stream;  // cudaStream_t; nullptr is the legacy default stream
};

// Throws std::invalid_argument naming the offending value. Needs no device.
void check(const ColumnSumParams& params);

// Enqueues the sum. Throws as check() does, and std::runtime_error with CUDA's own words if the launch fails.
void column_sum(const ColumnSumParams& params);

}  // namespace megatron_qwen
