// What a mixture of experts does to rows around its grouped GEMMs: maps of rows, sums of a token's rows, the shared
// expert's gate.
// T tokens, R routed rows, H hidden size, k experts per token. H is a multiple of 8, x and out start at multiples of 16
// bytes; 16-bit dtypes.
#pragma once

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

// tokens [R + T] and row_weights [R + T] of rows in expert order, those of the shared expert behind.
struct MoeRowMapParams {
  const std::int64_t* source;  // [R], index into the flat [T, k] weights of each row; null: rows are where they belong
  const float* weights;        // [T, k], flat
  const float* gates;          // [T] weights of the shared expert's rows; null: 1
  std::int32_t* tokens;        // [R + T]
  float* row_weights;          // [R + T]
  std::int64_t routed;         // R >= 1
  std::int64_t shared_tokens;  // T, or 0 without a shared expert
  std::int64_t topk;           // k
  void* stream;
};

// out [T, H] = sum_j rows[positions[:, j]] + shared + scale vector
struct MoeCombineParams {
  const void* rows;               // [R, H]
  const std::int64_t* positions;  // [T, k]
  const void* shared;             // [T, H], or null
  const float* scale;             // [T], or null
  const void* vector;             // [H], or null without scale
  void* out;                      // [T, H]
  std::int64_t tokens, size, topk;
  DType dtype;
  void* stream;
};

// out [T] = sigmoid(x vector)
struct MoeGateParams {
  const void* x;       // [T, H]
  const void* vector;  // [H]
  float* out;          // [T]
  std::int64_t tokens, size;
  DType dtype;
  void* stream;
};

// partial [programs, H]: sums of scale [T] times x [T, H], each program's over its share of the tokens
struct MoeGateGradientParams {
  const float* scale;
  const void* x;
  float* partial;
  std::int64_t tokens, size, programs;
  DType dtype;
  void* stream;
};

// Throw std::invalid_argument naming the offending value. Need no device.
void check(const MoeRowMapParams& params);
void check(const MoeCombineParams& params);
void check(const MoeGateParams& params);
void check(const MoeGateGradientParams& params);

// Enqueue one kernel. Throw as check() does, and std::runtime_error with CUDA's own words if the launch fails.
void moe_row_map(const MoeRowMapParams& params);
void moe_combine(const MoeCombineParams& params);
void moe_gate(const MoeGateParams& params);
void moe_gate_gradient(const MoeGateGradientParams& params);
// The programs that the current device takes.
std::int64_t moe_gate_gradient_programs(std::int64_t tokens, std::int64_t size);

}  // namespace megatron_qwen
