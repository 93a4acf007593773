// Descriptors of matrices for TMA, made on the host. The driver's function is looked up at run time: nothing links
// against libcuda, so the extension loads on machines without a driver.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "megatron_qwen/attention.h"
#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

// Columns of a box: 128 bytes of a 16-bit dtype, which is what the swizzle permutes.
constexpr int kBoxColumns = 64;

// Of a contiguous [rows, columns] of a 16-bit dtype, read in boxes of [box_rows, kBoxColumns], swizzled by 128 bytes.
// Throws std::runtime_error with the driver's error code.
CUtensorMap tensor_map(const char* op, const void* matrix, std::int64_t rows, std::int64_t columns, int box_rows,
                       DType dtype);

// Of heads [batch, rows, count, head_dim] of a 16-bit dtype, read in boxes of [box_rows, kBoxColumns] of one head. Axes
// are numbers of a head, rows, heads, batch.
CUtensorMap head_map(const char* op, const AttentionHeads& heads, std::int64_t batch, std::int64_t rows,
                     std::int64_t count, std::int64_t head_dim, int box_rows, DType dtype);

}  // namespace megatron_qwen
