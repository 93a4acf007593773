// Exact gradient of Dual Chunk Attention on sm_90a: a pass by tiles of keys for dk and dv, and one by tiles of queries
// for dq, neither of which adds anything up in memory; before them the rotation of heads and the terms of rows.
// Names as in attention.h; S rows and H heads of either queries or keys.
#pragma once

#include <cstdint>

#include "megatron_qwen/attention.h"

namespace megatron_qwen {

// Copies of heads, rotated by the segment of keys that they meet.
struct AttentionRotateParams {
  AttentionHeads x;
  std::int64_t batch, rows, heads, head_dim;
  const std::int32_t* positions;  // [S] of packed rows; null: start, start + 1, ...
  std::int64_t start;
  AttentionTables tables;
  AttentionChunks chunks;
  std::int64_t copies;  // 3: towards older chunks, the previous one, their own; 1: their own
  void* out;            // [copies, B, S, H, D], contiguous
  DType dtype;
  void* stream;  // cudaStream_t
};

// deltas = sum over D of grad output; exponents = log2(e) lse, +inf for rows without keys.
struct AttentionRowTermsParams {
  AttentionHeads grad, output;
  std::int64_t batch, rows, heads, head_dim;
  const float* lse;  // [B, H, S], contiguous
  float* exponents;  // as lse
  float* deltas;     // as lse
  DType dtype;
  void* stream;
};

// What both passes read.
struct AttentionBackwardInputs {
  AttentionProblem problem;  // its tiles are those of the keys, or of the queries
  AttentionHeads queries;    // [1 or 3, B, Sq, Hq, D] of AttentionRotateParams as [B or 3 B, ...]; 1 in plain attention
  AttentionHeads k;          // rotated
  AttentionHeads v;
  AttentionHeads grad;     // of the output, as the queries
  const float* exponents;  // [B, Hq, Sq]
  const float* deltas;
};

struct AttentionKeysBackwardParams {
  AttentionBackwardInputs inputs;
  bool turns_back;  // dk is that of the keys before their rotation
  void* dk;         // [B, Sk, Hkv, D], contiguous
  void* dv;
};

// Turned back, if there are tables.
struct AttentionQueriesBackwardParams {
  AttentionBackwardInputs inputs;
  void* dq;  // [B, Sq, Hq, D], contiguous
};

// Throw std::invalid_argument naming the offending value. Need no device.
void check(const AttentionRotateParams& params);
void check(const AttentionRowTermsParams& params);
void check(const AttentionKeysBackwardParams& params);
void check(const AttentionQueriesBackwardParams& params);

// Enqueue one kernel. Throw as check() does, and std::runtime_error with CUDA's own words if the launch fails, or if
// the device is not an sm_90 and the kernel is one of the latter two.
void attention_rotate(const AttentionRotateParams& params);
void attention_row_terms(const AttentionRowTermsParams& params);
void attention_keys_backward(const AttentionKeysBackwardParams& params);
void attention_queries_backward(const AttentionQueriesBackwardParams& params);

}  // namespace megatron_qwen
