// What becomes of a tile's product, while it is in registers. A thread has two rows of the tile and, of each 32
// columns, 8 neighbours: 16 bytes.
#pragma once

#include "row_gemm.cuh"
#include "vector.cuh"

namespace megatron_qwen {

// As in swiglu.cu: exactly 0 where exp overflows.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

struct RowPart {
  std::int64_t row;
  bool exists;
};

__device__ __forceinline__ RowPart row_of_thread(const RowTile& tile, int half) {
  const std::int64_t row = tile.first + first_row_of_thread() + 8 * half;
  return {row, row < tile.end};
}

// The thread's first column of a block of 32.
__device__ __forceinline__ std::int64_t column_of_thread(std::int64_t first, int block) {
  return first + 32 * block + 8 * (static_cast<int>(threadIdx.x) % 4);
}

template <typename T>
__device__ __forceinline__ void finish_up(const RowGemmParams& params, const RowTile& tile,
                                          const Accumulators& product) {
  const ExpertGroups& groups = params.groups;
  const std::int64_t own = is_shared(params, tile) ? params.shared_columns : params.columns;
  const std::int64_t first = tile.column_block * kColumnsPerTile<RowPass::kUp>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPart at = row_of_thread(tile, half);
    T* packed = static_cast<T*>(params.packed) +
                place_in_flat(groups, tile, at.row, 2 * params.columns, 2 * params.shared_columns);
    T* hidden =
        static_cast<T*>(params.hidden) + place_in_flat(groups, tile, at.row, params.columns, params.shared_columns);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      float gate[8], up[8], activated[8];
      gather_columns(product, block, half, gate);
      gather_columns(product, block + 4, half, up);
      const std::int64_t column = column_of_thread(first, block);
      if (!at.exists || column >= own) continue;
      if (params.packed != nullptr) {
        store_whole(packed + column, pack<T>(gate));
        store_whole(packed + own + column, pack<T>(up));
      }
      if (params.hidden == nullptr) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) activated[i] = gate[i] * sigmoid(gate[i]) * up[i];
      store_whole(hidden + column, pack<T>(activated));
    }
  }
}

template <typename T>
__device__ __forceinline__ void finish_down(const RowGemmParams& params, const RowTile& tile,
                                            const Accumulators& product) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPart at = row_of_thread(tile, half);
    const float weight = params.row_weights != nullptr && at.exists ? __ldg(params.row_weights + at.row) : 1.0f;
    T* out = static_cast<T*>(params.out) + at.row * params.columns;
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      float values[8];
      gather_columns(product, block, half, values);
      const std::int64_t column = column_of_thread(tile.column_block * kTileColumns, block);
      if (!at.exists || column >= params.columns) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= weight;
      store_whole(out + column, pack<T>(values));
    }
  }
}

// Of one row and 8 columns, from d = dy W2. With s = sigmoid(gate): silu' = s (1 + gate (1 - s)).
template <typename T>
__device__ __forceinline__ float store_activation_gradients(const float (&d)[8], float weight, const T* gate_at,
                                                            const T* up_at, T* hidden, T* grad_gate_at, T* grad_up_at) {
  float gate[8], up[8], activated[8], grad_gate[8], grad_up[8];
  unpack(load_once<8>(gate_at), gate);
  unpack(load_once<8>(up_at), up);
  float grad_weight = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float s = sigmoid(gate[i]);
    const float silu = gate[i] * s;
    const float weighted = d[i] * weight;
    grad_weight += d[i] * silu * up[i];
    activated[i] = silu * up[i] * weight;
    grad_up[i] = weighted * silu;
    grad_gate[i] = weighted * up[i] * s * (1.0f + gate[i] - silu);
  }
  store_whole(hidden, pack<T>(activated));
  store_whole(grad_gate_at, pack<T>(grad_gate));
  store_whole(grad_up_at, pack<T>(grad_up));
  return grad_weight;
}

// Where the partial sum of a row over this tile's columns goes.
__device__ __forceinline__ std::int64_t place_of_partial(const RowGemmParams& params, const RowTile& tile,
                                                         std::int64_t row) {
  const ExpertGroups& groups = params.groups;
  if (is_shared(params, tile)) {
    return blocks_of(params.columns, kTileColumns) * groups.routed + tile.column_block * groups.shared_tokens + row -
           groups.routed;
  }
  return tile.column_block * groups.routed + (params.slots != nullptr ? __ldg(params.slots + row) : row);
}

template <typename T>
__device__ __forceinline__ void finish_activation_backward(const RowGemmParams& params, const RowTile& tile,
                                                           const Accumulators& product) {
  const std::int64_t own = is_shared(params, tile) ? params.shared_columns : params.columns;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowPart at = row_of_thread(tile, half);
    const float weight = at.exists ? __ldg(params.row_weights + at.row) : 0.0f;
    const std::int64_t place =
        place_in_flat(params.groups, tile, at.row, 2 * params.columns, 2 * params.shared_columns);
    const T* packed = static_cast<const T*>(params.packed) + place;
    T* grad_packed = static_cast<T*>(params.grad_packed) + place;
    T* hidden = static_cast<T*>(params.hidden) +
                place_in_flat(params.groups, tile, at.row, params.columns, params.shared_columns);
    float grad_weight = 0.0f;
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      float d[8];
      gather_columns(product, block, half, d);
      const std::int64_t column = column_of_thread(tile.column_block * kTileColumns, block);
      if (!at.exists || column >= own) continue;
      grad_weight += store_activation_gradients(d, weight, packed + column, packed + own + column, hidden + column,
                                                grad_packed + column, grad_packed + own + column);
    }
    grad_weight += __shfl_xor_sync(0xffffffffu, grad_weight, 1);
    grad_weight += __shfl_xor_sync(0xffffffffu, grad_weight, 2);
    if (!at.exists || threadIdx.x % 4 != 0) continue;
    float total[1] = {grad_weight};
    store(params.partial + place_of_partial(params, tile, at.row), pack<float>(total));
  }
}

template <RowPass kPass, typename T>
__device__ __forceinline__ void multiply_tiles(const RowGemmParams& params, const Stages& stages) {
  Turn turn;
  RowSchedule schedule = schedule_of<kPass>(params);
  RowTile tile;
  Accumulators product;
  while (schedule.next(tile)) {
    multiply_stages<T, false, kIsTransposed<kPass>>(product, stages_of(params, tile), turn, stages);
    if constexpr (kPass == RowPass::kUp) {
      finish_up<T>(params, tile, product);
    } else if constexpr (kPass == RowPass::kActivationBackward) {
      finish_activation_backward<T>(params, tile, product);
    } else {
      finish_down<T>(params, tile, product);
    }
  }
}

template <RowPass kPass, typename T>
__global__ __launch_bounds__(kGemmThreads, 1) void grouped_rows_kernel(const __grid_constant__ RowGemmParams params) {
#if MEGATRON_QWEN_SM90
  const Stages stages(kGathers<kPass> ? 1 + kCopyThreads : 1);
  if (threadIdx.x < kCopyThreads) {
    sm90::give_up_registers<kCopyRegisters<kGathers<kPass>>>();
    copy_tiles<kPass>(params, stages);
  } else {
    sm90::take_registers<kMultiplyRegisters<kGathers<kPass>>>();
    multiply_tiles<kPass, T>(params, stages);
  }
#endif
}

}  // namespace megatron_qwen
