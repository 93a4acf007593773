// Which rows and keys a block works on: as in kernels/dual_chunk_attention/tiles.py.
#pragma once

#include <cuda_runtime.h>

#include "megatron_qwen/attention.h"

namespace megatron_qwen {

// Segments of keys, by the chunk of the rows that meet them.
constexpr int kOlderChunks = 0, kPreviousChunk = 1, kOwnChunk = 2;

__device__ __forceinline__ int floor_divide(int value, int divisor) {
  return value < 0 ? -((divisor - 1 - value) / divisor) : value / divisor;
}

// The position that rows `within` their chunk are rotated to for the keys of a segment.
__device__ __forceinline__ int query_position(int segment, int within, const AttentionChunks& chunks) {
  if (segment == kOlderChunks) return static_cast<int>(chunks.inter);
  if (segment == kOwnChunk) return within;
  return min(within + static_cast<int>(chunks.stride), static_cast<int>(chunks.cap));
}

struct Range {
  int low, high;
};

// A sequence and a tile of it. Rows are counted from the tensor's first, positions from the sequence's.
struct AttentionTile {
  int batch;
  int first_query, queries, query_start;  // row, count and position of the first
  int first_key, keys, key_start;
  int chunk_begin;  // position
  int begin, end;   // positions of the tile, cut off behind but not before the sequence's rows

  __device__ __forceinline__ int query_end() const { return query_start + queries; }
  __device__ __forceinline__ int key_end() const { return key_start + keys; }

  // Rows that meet this tile of keys in a segment.
  __device__ __forceinline__ Range rows_of_segment(int segment, int stride) const {
    const int low = segment == kOwnChunk ? max(begin, key_start) : chunk_begin + stride * (2 - segment);
    const int high = segment == kOlderChunks ? query_end() : chunk_begin + stride * (3 - segment);
    return {max(low, query_start), min(high, query_end())};
  }

  // Keys that this tile of rows meets in a segment; those of its own chunk up to its last row.
  __device__ __forceinline__ Range keys_of_segment(int segment, int stride) const {
    const int low = segment == kOlderChunks     ? key_start
                    : segment == kPreviousChunk ? chunk_begin - stride
                                                : chunk_begin;
    const int high = segment == kOlderChunks ? chunk_begin - stride : segment == kPreviousChunk ? chunk_begin : end;
    return {max(low, key_start), min(high, key_end())};
  }
};

__device__ __forceinline__ int boundary(const void* boundaries, std::int64_t bytes, int at) {
  if (bytes == 4) return __ldg(static_cast<const std::int32_t*>(boundaries) + at);
  return static_cast<int>(__ldg(static_cast<const std::int64_t*>(boundaries) + at));
}

// The tile of a slot, of keys if `of_keys`; false if it has none.
__device__ __forceinline__ bool find_tile(const AttentionProblem& problem, int slot, bool of_keys,
                                          AttentionTile& tile) {
  const AttentionSequences& sequences = problem.sequences;
  int number = 0;
  if (problem.tiles.list != nullptr) {
    const int sequence = __ldg(problem.tiles.list + 2 * std::int64_t{slot});
    if (sequence < 0) return false;
    number = __ldg(problem.tiles.list + 2 * std::int64_t{slot} + 1);
    tile.batch = 0;
    tile.first_query = boundary(sequences.cu_q, sequences.bytes, sequence);
    tile.first_key = boundary(sequences.cu_k, sequences.bytes, sequence);
    tile.queries = boundary(sequences.cu_q, sequences.bytes, sequence + 1) - tile.first_query;
    tile.keys = boundary(sequences.cu_k, sequences.bytes, sequence + 1) - tile.first_key;
    tile.key_start = 0;
    tile.query_start = tile.keys - tile.queries;
  } else {
    const int batch = static_cast<int>(problem.sizes.batch), step = slot / batch;
    tile.batch = slot - step * batch;
    number = static_cast<int>(problem.tiles.first) + (of_keys ? step : -step);
    tile.first_query = tile.first_key = 0;
    tile.queries = static_cast<int>(problem.sizes.rows_q);
    tile.keys = static_cast<int>(problem.sizes.rows_k);
    tile.query_start = static_cast<int>(sequences.query_start);
    tile.key_start = static_cast<int>(sequences.key_start);
  }
  const int stride = static_cast<int>(problem.chunks.stride), per_chunk = static_cast<int>(problem.tiles.per_chunk);
  const int chunk = floor_divide(number, per_chunk);
  tile.chunk_begin = chunk * stride;
  tile.begin = tile.chunk_begin + (number - chunk * per_chunk) * kAttentionTileRows;
  const int end = of_keys ? tile.key_end() : tile.query_end();
  tile.end = min(min(tile.begin + kAttentionTileRows, tile.chunk_begin + stride), end);
  return true;
}

}  // namespace megatron_qwen
