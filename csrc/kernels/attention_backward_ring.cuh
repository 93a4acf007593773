// Shared memory of the gradient's passes, and the warp that fills it. A block has two multiplying warpgroups, 64 rows
// of its tile each; what stays for the whole tile comes as a half per warpgroup, what streams past as a ring of 64 rows
// of two tensors.
//
// Rows of another sequence or segment must not get into a sum even as a product with 0, as they may be infinite: a
// step with fewer than 64 rows is copied by cp.async with zeros behind them, all others by TMA.
#pragma once

#include "attention_tiles.cuh"
#include "head_tile.cuh"
#include "stages.cuh"

namespace megatron_qwen {

constexpr int kStepRows = 64;

// Of one of the streamed tensors.
struct StreamedHead {
  const CUtensorMap* map;
  const AttentionHeads* heads;
  int batch, head;
};

// Rows first ... first + count - 1 of the tensors are those of a step.
struct StreamedRows {
  int first, count;
};

template <int kHead, int kFixedTiles, int kStageCount>
class BackwardShared {
 public:
  using Tile = HeadTile<kStepRows, kHead>;
  static constexpr int kFixedBytes = kFixedTiles * 2 * Tile::kBytes;
  static constexpr int kStepBytes = 2 * Tile::kBytes;
  // Three numbers per row of a step.
  static constexpr int kTermBytes = 3 * kStepRows * static_cast<int>(sizeof(float));
  static constexpr int kBarriers = 2 * kStageCount + kFixedTiles;
  static constexpr int kBytes =
      kFixedBytes + kStageCount * (kStepBytes + kTermBytes) + kBarriers * static_cast<int>(sizeof(sm90::Barrier));
  static_assert(kBytes <= 232448, "a block of sm_90 has 227 KiB of shared memory");

  struct Turn {
    int stage = 0;
    std::uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
      if (++stage != kStageCount) return;
      stage = 0;
      parity ^= 1;
    }
  };

  // All threads call it.
  __device__ __forceinline__ BackwardShared() : memory_(sm90::dynamic_shared()) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStageCount; ++stage) {
        sm90::initialize(full(stage), 2);
        sm90::initialize(empty(stage), kMultiplyThreads / 32);
      }
      for (int tile = 0; tile < kFixedTiles; ++tile) sm90::initialize(ready(tile), 1);
      sm90::fence_initialized_barriers();
    }
    __syncthreads();
  }

  __device__ __forceinline__ unsigned char* fixed(int tile, int half) const {
    return memory_ + (2 * tile + half) * Tile::kBytes;
  }
  __device__ __forceinline__ unsigned char* first(int stage) const {
    return memory_ + kFixedBytes + stage * kStepBytes;
  }
  __device__ __forceinline__ unsigned char* second(int stage) const { return first(stage) + Tile::kBytes; }
  // Of rows of a step: term 0, 1 or 2 of all of them.
  __device__ __forceinline__ float* terms(int stage, int term) const {
    return reinterpret_cast<float*>(memory_ + kFixedBytes + kStageCount * kStepBytes + stage * kTermBytes) +
           term * kStepRows;
  }
  __device__ __forceinline__ sm90::Barrier* full(int stage) const { return barriers() + stage; }
  __device__ __forceinline__ sm90::Barrier* empty(int stage) const { return barriers() + kStageCount + stage; }
  __device__ __forceinline__ sm90::Barrier* ready(int tile) const { return barriers() + 2 * kStageCount + tile; }

 private:
  __device__ __forceinline__ sm90::Barrier* barriers() const {
    return reinterpret_cast<sm90::Barrier*>(memory_ + kFixedBytes + kStageCount * (kStepBytes + kTermBytes));
  }

  unsigned char* memory_;
};

// By one thread: 128 rows from `row` on into a tile that stays. Rows that are not the tile's get into rows of the
// result that nobody stores.
template <typename Shared>
__device__ __forceinline__ void copy_fixed(const Shared& shared, int tile, const CUtensorMap* map, int batch, int head,
                                           int row) {
  using Tile = typename Shared::Tile;
  sm90::arrive_and_expect(shared.ready(tile), 2 * Tile::kBytes);
  for (int half = 0; half < 2; ++half) {
    Tile::copy(shared.fixed(tile, half), map, shared.ready(tile), batch, head, row + half * kStepRows);
  }
}

// By a warp: `count` rows, and zeros behind them.
template <typename Tile, int kHead>
__device__ __forceinline__ void copy_rows(unsigned char* destination, const StreamedHead& from,
                                          const StreamedRows& rows) {
  constexpr int kChunks = kHead / 8, kRowsAtOnce = 32 / kChunks;
  const int lane = static_cast<int>(threadIdx.x) % 32, chunk = lane % kChunks;
  const AttentionHeads& heads = *from.heads;
  const auto* source =
      static_cast<const unsigned char*>(heads.data) +
      2 * (from.batch * heads.batch_stride + from.head * heads.head_stride + rows.first * heads.row_stride + chunk * 8);
  const std::uint32_t address = sm90::shared_address(destination);
#pragma unroll 1
  for (int row = lane / kChunks; row < kStepRows; row += kRowsAtOnce) {
    const bool exists = row < rows.count;
    sm90::copy_16_bytes(address + Tile::offset(row, chunk), source + (exists ? 2 * row * heads.row_stride : 0), exists);
  }
}

// By a warp: both tensors' rows into the next stage, which is full once arrive_filled() is called, too.
template <int kHead, typename Shared>
__device__ __forceinline__ void copy_step(const Shared& shared, int stage, const StreamedHead& first,
                                          const StreamedHead& second, const StreamedRows& rows) {
  using Tile = typename Shared::Tile;
  const bool is_whole = rows.count == kStepRows, is_first = threadIdx.x == 0;
  sm90::Barrier* full = shared.full(stage);
  if (is_first) sm90::arrive_and_expect(full, is_whole ? Shared::kStepBytes : 0);
  if (is_whole) {
    if (!is_first) return;
    Tile::copy(shared.first(stage), first.map, full, first.batch, first.head, rows.first);
    Tile::copy(shared.second(stage), second.map, full, second.batch, second.head, rows.first);
    return;
  }
  copy_rows<Tile, kHead>(shared.first(stage), first, rows);
  copy_rows<Tile, kHead>(shared.second(stage), second, rows);
  sm90::commit_copies();
  sm90::wait_for_copies<0>();
  sm90::fence_for_async_proxy();
}

// By the same warp.
template <typename Shared>
__device__ __forceinline__ void arrive_filled(const Shared& shared, int stage) {
  __syncwarp();
  if (threadIdx.x == 0) sm90::arrive(shared.full(stage));
}

}  // namespace megatron_qwen
