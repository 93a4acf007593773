// Dual Chunk Attention on sm_90a, and plain causal attention as one chunk of it: see
// megatron_qwen/kernels/dual_chunk_attention/layout.py for the positions, and tiles.py for the tiles.
// B sequences, T tokens of packed ones, Sq and Sk tokens of a row, Hq and Hkv heads, D head size (64 or 128), L tokens
// of a chunk. 16-bit dtypes. Packed sequences are a batch of one.
#pragma once

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

// Rows of a tile of queries, or keys, and of a block of keys.
constexpr int kAttentionTileRows = 128;
// Positions are below it, so that twice a position is a number of 32 bits. It is L of plain attention.
constexpr std::int64_t kLongestSequence = std::int64_t{1} << 29;

// Heads [batch, rows, heads, D] with neighbouring numbers of a head; strides in elements.
struct AttentionHeads {
  const void* data;
  std::int64_t batch_stride;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

struct AttentionSizes {
  std::int64_t batch;
  std::int64_t rows_q;  // Sq or Tq
  std::int64_t rows_k;
  std::int64_t heads_q;
  std::int64_t heads_k;  // divides heads_q
  std::int64_t head_dim;
};

// Where rows of queries are rotated to, by the keys they meet.
struct AttentionChunks {
  std::int64_t stride;      // L
  std::int64_t cap;         // of the position towards the previous chunk
  std::int64_t inter;       // the position towards older chunks
  std::int64_t alike_from;  // rows of a chunk from here on have that position towards the previous chunk, too
  bool is_plain;            // own chunk only
};

// Positions of rows of queries and keys: all sequences alike, or packed.
struct AttentionSequences {
  const void* cu_q;  // [sequences + 1] of int32 or int64; null unless packed
  const void* cu_k;
  std::int64_t bytes;        // of one boundary
  std::int64_t query_start;  // position of the first query; 0 if packed
  std::int64_t key_start;
};

// Tiles of a launch, those with most work first.
struct AttentionTiles {
  const std::int32_t* list;  // [slots, 2] of packed sequences: sequence (or -1) and tile; else null
  std::int64_t slots;
  std::int64_t first;      // of all sequences that are alike; the next ones follow downwards, or upwards for keys
  std::int64_t per_chunk;  // ceil(L / kAttentionTileRows)
};

struct AttentionTables {
  const float* cos;  // [rows, D / 2], or null where nothing is to be rotated
  const float* sin;
  std::int64_t rows;
};

struct AttentionProblem {
  AttentionSizes sizes;
  AttentionChunks chunks;
  AttentionSequences sequences;
  AttentionTiles tiles;
  AttentionTables tables;
  float scale;               // of the logits, above 0
  const float* logit_scale;  // of each row of queries [rows_q], or null
  DType dtype;
  void* stream;  // cudaStream_t
};

// out = softmax(scale logit_scale q k^T) v, and the natural log-sum-exp of each row's logits.
struct AttentionForwardParams {
  AttentionProblem problem;
  AttentionHeads q;  // not rotated, where there are tables
  AttentionHeads k;  // rotated
  AttentionHeads v;
  void* out;   // [batch, rows_q, heads_q, D]
  float* lse;  // [batch, heads_q, rows_q]
};

// Throw std::invalid_argument naming the offending value. Need no device.
void check_problem(const char* op, const AttentionProblem& problem);
// `heads` as TMA reads them: 16-byte aligned, with strides of multiples of 16 bytes.
void check_heads(const char* op, const char* name, const AttentionHeads& heads);
void check(const AttentionForwardParams& params);

// Enqueue one kernel. Throw as check() does, and std::runtime_error with CUDA's own words if the launch fails, or if
// the device is not an sm_90.
void attention_forward(const AttentionForwardParams& params);

}  // namespace megatron_qwen
