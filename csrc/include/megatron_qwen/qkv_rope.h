// Bias, rotary embedding and split of Megatron-Core's packed QKV projection; its gradient; and rotation in place.
//
// A packed row holds `groups` groups, each of `queries` query heads, a key head and a value head of `head_dim` numbers:
// q q .. q k v | q q .. q k v | ... Query and key heads are rotated on their first 2 * half dimensions: with halves x1,
// x2, y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin (arXiv 2104.09864, "rotate half"). Arithmetic is fp32, rounded
// once.
//
// Strides and sizes are in elements. Neighbouring numbers of a head are neighbours in memory.
#pragma once

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

struct RopeTables {
  const float* cos;  // [rows, half], contiguous
  const float* sin;
  // Token t has position p[t / tokens_per_position], or t / tokens_per_position without positions. A position outside
  // of [0, rows) gives NaN.
  const void* positions;
  std::int64_t position_bytes;  // 4 (int32) or 8 (int64); 0: no positions
  std::int64_t tokens_per_position;
  std::int64_t rows;
  std::int64_t half;
};

struct QkvLayout {
  std::int64_t groups;
  std::int64_t queries;  // per group
  std::int64_t head_dim;
};

// Heads of tokens [sequence, batch, heads, head_dim]; token t is (t / batch, t % batch).
struct StridedHeads {
  void* data;
  std::int64_t sequence_stride;
  std::int64_t batch_stride;
  std::int64_t head_stride;
};

struct QkvRopeForwardParams {
  const void* packed;  // [tokens, packed_stride] of `dtype`
  const void* bias;    // [row] of `bias_dtype`, contiguous; null: none
  void* q;             // [tokens, groups * queries, head_dim], contiguous
  void* k;             // [tokens, groups, head_dim], contiguous
  void* v;             // as k
  RopeTables tables;
  QkvLayout layout;
  std::int64_t tokens;  // 0 returns without a launch
  std::int64_t packed_stride;
  DType dtype;
  DType bias_dtype;
  void* stream;  // cudaStream_t; nullptr is the legacy default stream
};

struct QkvRopeBackwardParams {
  StridedHeads grad_q, grad_k, grad_v;  // of `dtype`; read only
  void* grad_packed;                    // [tokens, row], contiguous
  void* grad_bias;                      // [row] of `bias_dtype`; null: not wanted
  float* partial;                       // [num_programs, row]: what each program adds to grad_bias; null without it
  RopeTables tables;
  QkvLayout layout;
  std::int64_t tokens;  // 0 returns without a launch
  std::int64_t batch;
  std::int64_t num_programs;  // that share the tokens; see qkv_rope_backward_programs
  DType dtype;
  DType bias_dtype;
  void* stream;
};

// Rotates the heads of q and k where they are.
struct RopeParams {
  StridedHeads q, k;
  RopeTables tables;
  std::int64_t q_heads;
  std::int64_t k_heads;  // 0: only q
  std::int64_t head_dim;
  std::int64_t tokens;  // 0 returns without a launch
  std::int64_t batch;
  bool inverse;  // by the opposite angle: the gradient
  DType dtype;
  void* stream;
};

// Throw std::invalid_argument naming the offending value. No device is needed.
void check(const QkvRopeForwardParams& params);
void check(const QkvRopeBackwardParams& params);
void check(const RopeParams& params);
void check(const char* op, const QkvLayout& layout, std::int64_t half);

// Whether every access is 16 bytes: sizes, strides and addresses are multiples of that, and a bias has the dtype of the
// rest. Otherwise the kernels move one element at a time.
bool moves_vectors(const QkvRopeForwardParams& params);
bool moves_vectors(const QkvRopeBackwardParams& params);
bool moves_vectors(const RopeParams& params);

// Enqueue the kernel. Throw as check() does, and std::runtime_error with CUDA's own words if the launch fails.
void qkv_rope_forward(const QkvRopeForwardParams& params);
void qkv_rope_backward(const QkvRopeBackwardParams& params);
void rope(const RopeParams& params);

// The num_programs whose blocks the current device holds all at once, so that there are few partial rows; with `tokens`
// >= 1 none is without a token.
std::int64_t qkv_rope_backward_programs(const QkvLayout& layout, std::int64_t half, std::int64_t tokens, DType dtype);

}  // namespace megatron_qwen
