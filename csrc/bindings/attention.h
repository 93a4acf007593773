// How Python passes attention's arguments: tuples, of which _C.pyi tells the types.
#pragma once

#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"
#include "megatron_qwen/attention.h"

namespace megatron_qwen::attention_arguments {

using Address = std::uintptr_t;
using Size = std::int64_t;
// Address, and strides of batch, rows and heads.
using Heads = std::tuple<Address, Size, Size, Size>;
// Batch, rows of queries and keys, heads of queries and keys, head_dim.
using Sizes = std::tuple<Size, Size, Size, Size, Size, Size>;
// L, cap, inter, alike_from, and whether attention is plain.
using Chunks = std::tuple<Size, Size, Size, Size, bool>;
// Addresses of the boundaries of queries and keys, bytes of one, positions of the first query and key.
using Sequences = std::tuple<Address, Address, Size, Size, Size>;
// Address of the list, slots, first tile, tiles of a chunk.
using Tiles = std::tuple<Address, Size, Size, Size>;
// Addresses of cos and sin, rows.
using Tables = std::tuple<Address, Address, Size>;
// Sizes, chunks, sequences, tiles, tables, scale, address of logit_scale.
using Problem = std::tuple<Sizes, Chunks, Sequences, Tiles, Tables, float, Address>;

inline AttentionHeads heads_of(const Heads& heads) {
  const auto& [data, batch_stride, row_stride, head_stride] = heads;
  return {at<const void>(data), batch_stride, row_stride, head_stride};
}

inline AttentionChunks chunks_of(const Chunks& chunks) {
  const auto& [stride, cap, inter, alike_from, is_plain] = chunks;
  return {stride, cap, inter, alike_from, is_plain};
}

inline AttentionTables tables_of(const Tables& tables) {
  const auto& [cos, sin, rows] = tables;
  return {at<const float>(cos), at<const float>(sin), rows};
}

inline AttentionProblem problem_of(const char* op, const Problem& problem, const std::string& dtype, Address stream) {
  const auto& [sizes, chunks, sequences, tiles, tables, scale, logit_scale] = problem;
  const auto& [batch, rows_q, rows_k, heads_q, heads_k, head_dim] = sizes;
  const auto& [cu_q, cu_k, bytes, query_start, key_start] = sequences;
  const auto& [list, slots, first, per_chunk] = tiles;
  return {{batch, rows_q, rows_k, heads_q, heads_k, head_dim},
          chunks_of(chunks),
          {at<const void>(cu_q), at<const void>(cu_k), bytes, query_start, key_start},
          {at<const std::int32_t>(list), slots, first, per_chunk},
          tables_of(tables),
          scale,
          at<const float>(logit_scale),
          parse_dtype(op, "dtype", dtype),
          at<void>(stream)};
}

}  // namespace megatron_qwen::attention_arguments
