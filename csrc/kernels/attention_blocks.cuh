// The work of the forward pass: tiles of queries dealt out to blocks, and the blocks of keys that a tile meets.
#pragma once

#include "attention_tiles.cuh"

namespace megatron_qwen {

struct QueryTile : AttentionTile {
  int head;
};

// Tiles times heads, heads of a tile side by side: they read the same keys at about the same time. The list begins with
// the longest tiles, and every other round of all blocks goes backwards, so that no block gets the longest of each.
class QuerySchedule {
 public:
  __device__ __forceinline__ explicit QuerySchedule(const AttentionProblem& problem)
      : problem_(problem), items_(problem.tiles.slots * problem.sizes.heads_q) {}

  // False after the last tile.
  __device__ __forceinline__ bool next(QueryTile& tile) {
    while (begin_ < items_) {
      const std::int64_t item = begin_ + (backwards_ ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      begin_ += gridDim.x;
      backwards_ = !backwards_;
      if (item >= items_) continue;
      const auto slot = static_cast<int>(item / problem_.sizes.heads_q);
      tile.head = static_cast<int>(item - slot * problem_.sizes.heads_q);
      if (find_tile(problem_, slot, false, tile)) return true;
    }
    return false;
  }

 private:
  const AttentionProblem& problem_;
  std::int64_t items_;
  std::int64_t begin_ = 0;
  bool backwards_ = false;
};

// Blocks of kAttentionTileRows keys, segment after segment: older chunks, the previous one, the tile's own.
class KeyBlocks {
 public:
  __device__ __forceinline__ KeyBlocks(const AttentionProblem& problem, const QueryTile& tile)
      : tile_(tile),
        stride_(static_cast<int>(problem.chunks.stride)),
        segment_(problem.chunks.is_plain ? kOwnChunk - 1 : kOlderChunks - 1),
        is_alike_(tile.begin - tile.chunk_begin >= static_cast<int>(problem.chunks.alike_from)) {}

  // To the next block; false after the last.
  __device__ __forceinline__ bool next() {
    key_ += kAttentionTileRows;
    wants_queries_ = false;
    return key_ < range_.high || next_segment();
  }

  // To the first block of the next segment that has keys; false if there is none.
  __device__ __forceinline__ bool next_segment() {
    const int previous = range_.low < range_.high ? segment_ : kOwnChunk;
    while (++segment_ <= kOwnChunk) {
      range_ = tile_.keys_of_segment(segment_, stride_);
      if (range_.low >= range_.high) continue;
      key_ = range_.low;
      wants_queries_ = !(previous == kOlderChunks && segment_ == kPreviousChunk && is_alike_);
      return true;
    }
    return false;
  }

  // Whether this block is the first whose rows are rotated in this way.
  __device__ __forceinline__ bool wants_queries() const { return wants_queries_; }
  __device__ __forceinline__ int segment() const { return segment_; }
  // Positions of the first key of the block and behind the last of the segment.
  __device__ __forceinline__ int key() const { return key_; }
  __device__ __forceinline__ int end() const { return range_.high; }
  // Row of k of the first key.
  __device__ __forceinline__ int row() const { return tile_.first_key + (key_ - tile_.key_start); }

 private:
  const QueryTile& tile_;
  int stride_, segment_;
  bool is_alike_;
  bool wants_queries_ = false;
  int key_ = 0;
  Range range_{0, 0};
};

}  // namespace megatron_qwen
