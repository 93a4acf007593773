// Gradients of matrices: per group, the sum over its rows of one operand's row times the other's. The terms of the sum
// are rows, so both operands are boxes of 64 rows by 64 columns. Rows of x (or dy) are gathered by cp.async, those of
// the flat operand come by TMA, but for the last block of a group: the next group's rows must not get in, so cp.async
// fills up with zeros there.
//
//   out             left, 128 columns of it    right, 256 columns of it
//   [factor F, H]   flat                       x
//   [H, F]          x (dy)                     flat
#pragma once

#include "megatron_qwen/grouped_mlp.h"
#include "multiply.cuh"
#include "row_schedule.cuh"
#include "tensor_map.cuh"
#include "vector.cuh"

namespace megatron_qwen {

struct WeightGradientParams {
  ExpertGroups groups;
  std::int64_t width, shared_width;  // of flat
  const void* flat;
  const void* x;
  bool x_is_left;
  bool adds;
  bool out_is_float;
  CUtensorMap maps[2];  // of flat: routed and shared rows
  void* out[kMostGroups];
};

struct GradientTile {
  int group;
  std::int64_t begin, end;  // rows of the group
  std::int64_t flat_width;
  std::int64_t row_block, column_block;  // of out
};

class GradientSchedule {
 public:
  __device__ __forceinline__ explicit GradientSchedule(const WeightGradientParams& params)
      : params_(params), next_(blockIdx.x) {}

  __device__ __forceinline__ bool next(GradientTile& tile) {
    const ExpertGroups& groups = params_.groups;
    std::int64_t at = next_;
    next_ += gridDim.x;
    const std::int64_t shared_tiles = groups.shared_tokens != 0 ? tiles_of(params_.shared_width) : 0;
    const bool is_shared = at < shared_tiles;
    tile.flat_width = is_shared ? params_.shared_width : params_.width;
    if (is_shared) {
      tile.group = static_cast<int>(groups.experts);
      tile.begin = groups.routed;
      tile.end = groups.routed + groups.shared_tokens;
    } else {
      at -= shared_tiles;
      const std::int64_t tiles = tiles_of(params_.width);
      if (at >= tiles * groups.experts) return false;
      tile.group = static_cast<int>(at / tiles);
      at -= tile.group * tiles;
      tile.begin = __ldg(groups.offsets + tile.group);
      tile.end = __ldg(groups.offsets + tile.group + 1);
    }
    const std::int64_t columns = blocks_of(columns_of(tile.flat_width), kTileColumns);
    tile.row_block = at / columns;
    tile.column_block = at - tile.row_block * columns;
    return true;
  }

  __device__ __forceinline__ std::int64_t rows_of(std::int64_t width) const {
    return params_.x_is_left ? params_.groups.size : width;
  }
  __device__ __forceinline__ std::int64_t columns_of(std::int64_t width) const {
    return params_.x_is_left ? width : params_.groups.size;
  }

 private:
  __device__ __forceinline__ std::int64_t tiles_of(std::int64_t width) const {
    return blocks_of(rows_of(width), kTileRows) * blocks_of(columns_of(width), kTileColumns);
  }

  const WeightGradientParams& params_;
  std::int64_t next_;
};

// Rows of a box that a thread copies 16 bytes of.
constexpr int kBoxRowsPerThread = 64 / (kCopyThreads / 8);

// Copies 64 rows of `boxes` boxes; row i of the thread begins at source + starts[i] elements, or is zeros if negative.
__device__ __forceinline__ void copy_boxes(unsigned char* destination, int boxes, const void* source,
                                           const std::int64_t (&starts)[kBoxRowsPerThread], std::int64_t first_column,
                                           std::int64_t width) {
  const int chunk = static_cast<int>(threadIdx.x) % 8;
  const int first_row = static_cast<int>(threadIdx.x) / 8;
  std::uint32_t address = sm90::shared_address(destination);
  std::int64_t column = first_column + chunk * 8;
#pragma unroll 1
  for (int box = 0; box < boxes; ++box, address += kBoxBytes, column += kBoxColumns) {
#pragma unroll
    for (int i = 0; i < kBoxRowsPerThread; ++i) {
      const bool exists = starts[i] >= 0 && column < width;
      const std::int64_t element = exists ? starts[i] + column : 0;
      sm90::copy_16_bytes(address + swizzled_offset(first_row + 16 * i, chunk),
                          static_cast<const unsigned char*>(source) + element * 2, exists);
    }
  }
}

class GradientCopies {
 public:
  __device__ __forceinline__ GradientCopies(const WeightGradientParams& params, const GradientTile& tile)
      : params_(params),
        tile_(tile),
        x_column_(params.x_is_left ? tile.row_block * kTileRows : tile.column_block * kTileColumns),
        flat_column_(params.x_is_left ? tile.column_block * kTileColumns : tile.row_block * kTileRows) {}

  // All copying threads: a block of 64 rows into a stage.
  __device__ __forceinline__ void copy(std::int64_t first, int stage, const Stages& stages) const {
    const bool is_shared = tile_.group == params_.groups.experts;
    const std::int64_t base = is_shared ? params_.groups.routed : 0;
    const int left_boxes = kTileRows / kBoxColumns, right_boxes = kTileColumns / kBoxColumns;
    unsigned char* x_boxes = params_.x_is_left ? stages.left(stage) : stages.right(stage);
    unsigned char* flat_boxes = params_.x_is_left ? stages.right(stage) : stages.left(stage);
    const int flat_count = params_.x_is_left ? right_boxes : left_boxes;
    const bool is_whole = first + kTileDepth <= tile_.end;
    if (threadIdx.x == 0) {
      sm90::Barrier* full = stages.full(stage);
      sm90::arrive_and_expect(full, is_whole ? flat_count * kBoxBytes : 0);
      for (int box = 0; is_whole && box < flat_count; ++box) {
        sm90::copy_box(flat_boxes + box * kBoxBytes, params_.maps + (is_shared ? 1 : 0), full,
                       static_cast<std::int32_t>(first - base),
                       static_cast<std::int32_t>(flat_column_ + box * kBoxColumns));
      }
    }
    std::int64_t starts[kBoxRowsPerThread];
#pragma unroll
    for (int i = 0; i < kBoxRowsPerThread; ++i) {
      const std::int64_t row = row_of_thread(first, i);
      starts[i] = row < tile_.end ? __ldg(params_.groups.tokens + row) * params_.groups.size : -1;
    }
    copy_boxes(x_boxes, params_.x_is_left ? left_boxes : right_boxes, params_.x, starts, x_column_,
               params_.groups.size);
    if (is_whole) return;
#pragma unroll
    for (int i = 0; i < kBoxRowsPerThread; ++i) {
      const std::int64_t row = row_of_thread(first, i);
      starts[i] = row < tile_.end ? base * params_.width + (row - base) * tile_.flat_width : -1;
    }
    copy_boxes(flat_boxes, flat_count, params_.flat, starts, flat_column_, tile_.flat_width);
  }

 private:
  __device__ __forceinline__ static std::int64_t row_of_thread(std::int64_t first, int i) {
    return first + static_cast<int>(threadIdx.x) / 8 + 16 * i;
  }

  const WeightGradientParams& params_;
  const GradientTile& tile_;
  std::int64_t x_column_, flat_column_;
};

__device__ __forceinline__ void copy_gradient_tiles(const WeightGradientParams& params, const Stages& stages) {
  Turn turn;
  LateArrivals arrivals(stages);
  GradientSchedule schedule(params);
  GradientTile tile;
  while (schedule.next(tile)) {
    const GradientCopies copies(params, tile);
    for (std::int64_t row = tile.begin; row < tile.end; row += kTileDepth, turn.advance()) {
      sm90::wait(stages.empty(turn.stage), turn.parity ^ 1);
      copies.copy(row, turn.stage, stages);
      arrivals.issued();
    }
  }
  arrivals.finish();
}

// 8 neighbouring numbers, after what is there if `adds`.
template <typename T>
__device__ __forceinline__ void store_gradient(T* at, float (&values)[8], bool adds) {
  if (adds) {
    float before[8];
    unpack(load_once<8>(at), before);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] += before[i];
  }
  store_whole(at, pack<T>(values));
}

// Calls visit(element of out, block, whether it exists) for each 8 columns that this thread has of its row `half`.
template <typename Visit>
__device__ __forceinline__ void for_columns(const GradientSchedule& schedule, const GradientTile& tile, int half,
                                            Visit&& visit) {
  const std::int64_t rows = schedule.rows_of(tile.flat_width), columns = schedule.columns_of(tile.flat_width);
  const std::int64_t row = tile.row_block * kTileRows + first_row_of_thread() + 8 * half;
  const std::int64_t first = tile.column_block * kTileColumns + 8 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int block = 0; block < kTileColumns / 32; ++block) {
    const std::int64_t column = first + 32 * block;
    visit(row * columns + column, block, row < rows && column < columns);
  }
}

template <typename T>
__device__ __forceinline__ void finish_gradient(const WeightGradientParams& params, const GradientSchedule& schedule,
                                                const GradientTile& tile, const Accumulators& product) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for_columns(schedule, tile, half, [&](std::int64_t at, int block, bool exists) {
      float values[8];
      gather_columns(product, block, half, values);
      if (!exists) return;
      if (params.out_is_float) {
        store_gradient(static_cast<float*>(params.out[tile.group]) + at, values, params.adds);
      } else {
        store_gradient(static_cast<T*>(params.out[tile.group]) + at, values, params.adds);
      }
    });
  }
}

// Zeros. Apart from the sums, as accumulators set by anything but wgmma would have ptxas wait for each multiplication.
template <typename T>
__device__ __forceinline__ void finish_without_rows(const WeightGradientParams& params,
                                                    const GradientSchedule& schedule, const GradientTile& tile) {
  for (int half = 0; half < 2; ++half) {
    for_columns(schedule, tile, half, [&](std::int64_t at, int, bool exists) {
      float zeros[8] = {};
      if (!exists) return;
      if (params.out_is_float) {
        store_gradient(static_cast<float*>(params.out[tile.group]) + at, zeros, false);
      } else {
        store_gradient(static_cast<T*>(params.out[tile.group]) + at, zeros, false);
      }
    });
  }
}

template <typename T>
__device__ __forceinline__ void multiply_gradient_tiles(const WeightGradientParams& params, const Stages& stages) {
  Turn turn;
  GradientSchedule schedule(params);
  GradientTile tile;
  Accumulators product;
  while (schedule.next(tile)) {
    const std::int64_t blocks = blocks_of(tile.end - tile.begin, kTileDepth);
    if (blocks == 0) {
      if (!params.adds) finish_without_rows<T>(params, schedule, tile);
      continue;
    }
    multiply_stages<T, true, true>(product, blocks, turn, stages);
    finish_gradient<T>(params, schedule, tile, product);
  }
}

template <typename T>
__global__ __launch_bounds__(kGemmThreads, 1) void grouped_weight_gradient_kernel(
    const __grid_constant__ WeightGradientParams params) {
#if MEGATRON_QWEN_SM90
  const Stages stages(1 + kCopyThreads);
  if (threadIdx.x < kCopyThreads) {
    sm90::give_up_registers<kCopyRegisters<true>>();
    copy_gradient_tiles(params, stages);
  } else {
    sm90::take_registers<kMultiplyRegisters<true>>();
    multiply_gradient_tiles<T>(params, stages);
  }
#endif
}

}  // namespace megatron_qwen
