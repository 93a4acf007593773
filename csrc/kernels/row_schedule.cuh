// Which tile comes next: blocks of 128 rows of a group times blocks of columns. Every thread of a launch walks through
// the same list and takes each gridDim.x-th tile; the groups are found by their offsets on the device, so the host
// waits for nothing. The shared expert's tiles come first, as theirs are the longest sums of some launches.
#pragma once

#include <cstdint>

#include "megatron_qwen/grouped_mlp.h"
#include "operand_tile.cuh"

namespace megatron_qwen {

// Blocks of rows whose tiles are neighbours in the list, columns outside of them: 132 tiles at a time share 16 blocks
// of rows and 8 of columns, which at H 3584 are 30 MB, less than the L2 cache has.
constexpr std::int64_t kBandBlocks = 16;

struct RowTile {
  int group;           // E is the shared expert
  std::int64_t first;  // row
  std::int64_t end;    // of the group's rows
  std::int64_t column_block;
};

__host__ __device__ __forceinline__ std::int64_t blocks_of(std::int64_t count, std::int64_t step) {
  return (count + step - 1) / step;
}

class RowSchedule {
 public:
  // Blocks of columns of a routed group and of the shared expert.
  __device__ __forceinline__ RowSchedule(const ExpertGroups& groups, std::int64_t columns, std::int64_t shared_columns)
      : groups_(groups),
        columns_(columns),
        shared_columns_(shared_columns),
        shared_tiles_(blocks_of(groups.shared_tokens, kTileRows) * shared_columns),
        next_(blockIdx.x),
        end_(__ldg(groups.offsets + 1)) {}

  // False after the last tile.
  __device__ __forceinline__ bool next(RowTile& tile) {
    const std::int64_t at = next_;
    next_ += gridDim.x;
    if (at < shared_tiles_) {
      tile.group = static_cast<int>(groups_.experts);
      place(at, groups_.routed, groups_.routed + groups_.shared_tokens, shared_columns_, tile);
      return true;
    }
    while (true) {
      const std::int64_t local = at - shared_tiles_ - before_;
      const std::int64_t tiles = blocks_of(end_ - begin_, kTileRows) * columns_;
      if (local < tiles) {
        tile.group = group_;
        place(local, begin_, end_, columns_, tile);
        return true;
      }
      if (group_ + 1 == groups_.experts) return false;
      before_ += tiles;
      ++group_;
      begin_ = end_;
      end_ = __ldg(groups_.offsets + group_ + 1);
    }
  }

 private:
  __device__ __forceinline__ static void place(std::int64_t local, std::int64_t begin, std::int64_t end,
                                               std::int64_t columns, RowTile& tile) {
    const std::int64_t band = local / (kBandBlocks * columns);
    const std::int64_t inside = local - band * kBandBlocks * columns;
    const std::int64_t left = blocks_of(end - begin, kTileRows) - band * kBandBlocks;
    const std::int64_t height = left < kBandBlocks ? left : kBandBlocks;
    tile.column_block = inside / height;
    tile.first = begin + (band * kBandBlocks + inside - tile.column_block * height) * kTileRows;
    tile.end = end;
  }

  const ExpertGroups& groups_;
  std::int64_t columns_, shared_columns_, shared_tiles_, next_;
  std::int64_t before_ = 0;  // tiles of the routed groups before this one
  std::int64_t begin_ = 0, end_;
  int group_ = 0;
};

}  // namespace megatron_qwen
