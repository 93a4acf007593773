// Rows of a group times its matrix: the four passes whose result has a row per routed (or shared) row.
//
//   pass                 left operand [128, 64]     right operand [64, 256]              columns of a tile
//   kUp                  rows of x, gathered        128 gate rows and 128 up rows of W1  128 of F, both halves
//   kDown                rows of hidden, by TMA     256 rows of W2                       256 of H
//   kActivationBackward  rows of dy, gathered       W2, neighbours along F               256 of F
//   kInputGradient       rows of grad_packed, TMA   W1, neighbours along H               256 of H
#pragma once

#include "megatron_qwen/grouped_mlp.h"
#include "multiply.cuh"
#include "row_schedule.cuh"
#include "tensor_map.cuh"

namespace megatron_qwen {

enum class RowPass { kUp, kDown, kActivationBackward, kInputGradient };

template <RowPass kPass>
constexpr bool kGathers = kPass == RowPass::kUp || kPass == RowPass::kActivationBackward;
// Whether the neighbours of W in memory are neighbouring columns of the product.
template <RowPass kPass>
constexpr bool kIsTransposed = kPass == RowPass::kActivationBackward || kPass == RowPass::kInputGradient;
template <RowPass kPass>
constexpr int kColumnsPerTile = kPass == RowPass::kUp ? kTileColumns / 2 : kTileColumns;
// Rows of a box of W.
template <RowPass kPass>
constexpr int kMatrixBoxRows = kIsTransposed<kPass> ? kTileDepth : kTileColumns / 2;

struct RowGemmParams {
  ExpertGroups groups;
  std::int64_t depth, shared_depth;      // terms of the sum
  std::int64_t columns, shared_columns;  // of the product; of a half of it in kUp
  const void* source;                    // what rows are gathered from, [x_rows, depth]
  const float* row_weights;
  const std::int64_t* slots;
  void* packed;
  void* grad_packed;
  void* hidden;
  void* out;
  float* partial;
  CUtensorMap flat[2];  // the left operand's routed and shared part, where it is not gathered
  CUtensorMap matrices[kMostGroups];
};

__device__ __forceinline__ bool is_shared(const RowGemmParams& params, const RowTile& tile) {
  return tile.group == params.groups.experts;
}

// Where a row of a flat buffer begins: [R, width], then [T, shared_width].
__device__ __forceinline__ std::int64_t place_in_flat(const ExpertGroups& groups, const RowTile& tile, std::int64_t row,
                                                      std::int64_t width, std::int64_t shared_width) {
  if (tile.group != groups.experts) return row * width;
  return groups.routed * width + (row - groups.routed) * shared_width;
}

// Copies 64 columns of up to 128 rows, of which a thread has 16 bytes of each 16th; rows and columns that are not there
// become 0.
class RowGather {
 public:
  static constexpr int kRowsPerThread = kTileRows / (kCopyThreads / 8);

  __device__ __forceinline__ RowGather(const RowGemmParams& params, const RowTile& tile)
      : source_(static_cast<const unsigned char*>(params.source)), depth_(params.groups.size) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const std::int64_t row = tile.first + row_in_tile(i);
      tokens_[i] = row < tile.end ? __ldg(params.groups.tokens + row) : -1;
    }
  }

  __device__ __forceinline__ void copy(unsigned char* destination, std::int64_t first_column) const {
    const int chunk = static_cast<int>(threadIdx.x) % 8;
    const std::int64_t column = first_column + chunk * 8;
    const std::uint32_t address = sm90::shared_address(destination);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const bool exists = tokens_[i] >= 0 && column < depth_;
      const std::int64_t element = exists ? tokens_[i] * depth_ + column : 0;
      sm90::copy_16_bytes(address + swizzled_offset(row_in_tile(i), chunk), source_ + element * 2, exists);
    }
  }

 private:
  __device__ __forceinline__ static int row_in_tile(int i) { return static_cast<int>(threadIdx.x) / 8 + 16 * i; }

  const unsigned char* source_;
  std::int64_t depth_;
  std::int32_t tokens_[kRowsPerThread];
};

// By one thread.
template <RowPass kPass>
__device__ __forceinline__ void copy_matrix(const RowGemmParams& params, const RowTile& tile, std::int64_t depth,
                                            unsigned char* destination, sm90::Barrier* barrier) {
  // TMA counts coordinates in 32 bits; check() saw to it that they fit.
  const CUtensorMap* map = params.matrices + tile.group;
  const auto at = static_cast<std::int32_t>(depth);
  const auto column = static_cast<std::int32_t>(tile.column_block * kColumnsPerTile<kPass>);
  if constexpr (kIsTransposed<kPass>) {
#pragma unroll
    for (int box = 0; box < kTileColumns / kBoxColumns; ++box) {
      sm90::copy_box(destination + box * kBoxBytes, map, barrier, at, column + box * kBoxColumns);
    }
  } else {
    constexpr int kHalf = kTileColumns / 2;
    const auto second =
        kPass == RowPass::kUp
            ? column + static_cast<std::int32_t>(is_shared(params, tile) ? params.shared_columns : params.columns)
            : column + kHalf;
    sm90::copy_box(destination, map, barrier, column, at);
    sm90::copy_box(destination + kHalf * kRowBytes, map, barrier, second, at);
  }
}

template <RowPass kPass>
__device__ __forceinline__ RowSchedule schedule_of(const RowGemmParams& params) {
  constexpr std::int64_t kColumns = kColumnsPerTile<kPass>;
  return RowSchedule(params.groups, blocks_of(params.columns, kColumns), blocks_of(params.shared_columns, kColumns));
}

__device__ __forceinline__ std::int64_t stages_of(const RowGemmParams& params, const RowTile& tile) {
  return blocks_of(is_shared(params, tile) ? params.shared_depth : params.depth, kTileDepth);
}

// The left operand of all blocks by all threads, and the right one by the first.
template <RowPass kPass>
__device__ __forceinline__ void copy_gathered(const RowGemmParams& params, const RowTile& tile, Turn& turn,
                                              LateArrivals& arrivals, const Stages& stages) {
  const RowGather rows(params, tile);
  const std::int64_t blocks = stages_of(params, tile);
  for (std::int64_t block = 0; block < blocks; ++block, turn.advance()) {
    sm90::wait(stages.empty(turn.stage), turn.parity ^ 1);
    if (threadIdx.x == 0) {
      sm90::arrive_and_expect(stages.full(turn.stage), kRightBytes);
      copy_matrix<kPass>(params, tile, block * kTileDepth, stages.right(turn.stage), stages.full(turn.stage));
    }
    rows.copy(stages.left(turn.stage), block * kTileDepth);
    arrivals.issued();
  }
}

// Both operands of all blocks, by one thread.
template <RowPass kPass>
__device__ __forceinline__ void copy_boxes_of(const RowGemmParams& params, const RowTile& tile, Turn& turn,
                                              const Stages& stages) {
  const bool shared = is_shared(params, tile);
  const auto row = static_cast<std::int32_t>(tile.first - (shared ? params.groups.routed : 0));
  const auto blocks = static_cast<std::int32_t>(stages_of(params, tile));
  for (std::int32_t block = 0; block < blocks; ++block, turn.advance()) {
    sm90::Barrier* full = stages.full(turn.stage);
    sm90::wait(stages.empty(turn.stage), turn.parity ^ 1);
    sm90::arrive_and_expect(full, kStageBytes);
    sm90::copy_box(stages.left(turn.stage), params.flat + (shared ? 1 : 0), full, row, block * kTileDepth);
    copy_matrix<kPass>(params, tile, block * kTileDepth, stages.right(turn.stage), full);
  }
}

template <RowPass kPass>
__device__ __forceinline__ void copy_tiles(const RowGemmParams& params, const Stages& stages) {
  Turn turn;
  RowSchedule schedule = schedule_of<kPass>(params);
  RowTile tile;
  if constexpr (kGathers<kPass>) {
    LateArrivals arrivals(stages);
    while (schedule.next(tile)) copy_gathered<kPass>(params, tile, turn, arrivals, stages);
    arrivals.finish();
  } else {
    if (threadIdx.x != 0) return;
    while (schedule.next(tile)) copy_boxes_of<kPass>(params, tile, turn, stages);
  }
}

}  // namespace megatron_qwen
