// Forward: one pass over the keys of a tile of 128 queries of a head, one online softmax through all segments.
//
//   warps 0       TMA: keys and values, block by block, into a ring
//   warps 1-3     queries: rotated from the tables for the next segment, rounded and written as an operand of wgmma
//                 while the products of the segment before still run; two buffers
//   warps 4-11    two warpgroups of 64 rows: logits, softmax, output in registers
//
// A block is launched per multiprocessor and takes tile after tile. Between segments only the buffer of queries
// changes: the products of two blocks of keys overlap across segments as they do within one.
#pragma once

#include "attention_softmax.cuh"
#include "head_tile.cuh"
#include "multiply.cuh"

namespace megatron_qwen {

constexpr int kQueryWarpThreads = kCopyThreads - 32;
constexpr int kQueryBuffers = 2;
// Rotating wants more registers than copying; with 56 it spills.
constexpr int kForwardCopyRegisters = 72;
constexpr int kForwardMultiplyRegisters = 216;
// Blocks of keys in shared memory: what 227 KiB hold beside the queries; more of small heads, whose products are short.
template <int kHead>
constexpr int kKeyStages = kHead == 64 ? 4 : 2;
// Barriers of threads: of all that multiply, and of either of their groups.
constexpr int kMultiplyBarrier = 1, kTurnBarrier = 2;

struct AttentionForwardLaunch {
  AttentionProblem problem;
  AttentionHeads q;
  void* out;
  float* lse;
  CUtensorMap k, v;
};

// A place in a ring of kCount, and how often (mod 2) it was passed.
template <int kCount>
struct RingPlace {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage != kCount) return;
    stage = 0;
    parity ^= 1;
  }
};

// Full and empty barriers of a ring of tiles.
template <int kCount, int kBytes>
class TileRing {
 public:
  static constexpr int kSharedBytes = kCount * kBytes;
  static constexpr int kBarriers = 2 * kCount;
  using Place = RingPlace<kCount>;

  __device__ __forceinline__ TileRing(unsigned char* tiles, sm90::Barrier* barriers)
      : tiles_(tiles), barriers_(barriers) {}

  // By one thread. A warp that multiplies comes once to the barrier of an empty stage.
  __device__ __forceinline__ void initialize(std::uint32_t arrivals) const {
    for (int stage = 0; stage < kCount; ++stage) {
      sm90::initialize(barriers_ + stage, arrivals);
      sm90::initialize(barriers_ + kCount + stage, kMultiplyThreads / 32);
    }
  }

  __device__ __forceinline__ unsigned char* tile(const Place& at) const { return tiles_ + at.stage * kBytes; }
  __device__ __forceinline__ sm90::Barrier* full(const Place& at) const { return barriers_ + at.stage; }
  __device__ __forceinline__ sm90::Barrier* empty(const Place& at) const { return barriers_ + kCount + at.stage; }
  __device__ __forceinline__ void wait_full(const Place& at) const { sm90::wait(full(at), at.parity); }
  __device__ __forceinline__ void wait_empty(const Place& at) const { sm90::wait(empty(at), at.parity ^ 1); }
  // By all threads that multiply, once they are done with the stage.
  __device__ __forceinline__ void release(Place& at) const {
    if (threadIdx.x % 32 == 0) sm90::arrive(empty(at));
    at.advance();
  }

 private:
  unsigned char* tiles_;
  sm90::Barrier* barriers_;
};

template <int kHead>
struct ForwardShared {
  using Tile = HeadTile<kAttentionTileRows, kHead>;
  using Queries = TileRing<kQueryBuffers, Tile::kBytes>;
  using Keys = TileRing<kKeyStages<kHead>, Tile::kBytes>;
  static constexpr int kTileBytes = Queries::kSharedBytes + 2 * Keys::kSharedBytes;
  static constexpr int kBytes =
      kTileBytes + (Queries::kBarriers + 2 * Keys::kBarriers) * static_cast<int>(sizeof(sm90::Barrier));
  static_assert(kBytes <= 232448, "a block of sm_90 has 227 KiB of shared memory");

  Queries queries;
  Keys keys, values;

  // All threads call it.
  __device__ __forceinline__ explicit ForwardShared(unsigned char* memory)
      : queries(memory, barriers(memory)),
        keys(memory + Queries::kSharedBytes, barriers(memory) + Queries::kBarriers),
        values(memory + Queries::kSharedBytes + Keys::kSharedBytes,
               barriers(memory) + Queries::kBarriers + Keys::kBarriers) {
    if (threadIdx.x == 0) {
      queries.initialize(kQueryWarpThreads);
      keys.initialize(1);
      values.initialize(1);
      sm90::fence_initialized_barriers();
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ static sm90::Barrier* barriers(unsigned char* memory) {
    return reinterpret_cast<sm90::Barrier*>(memory + kTileBytes);
  }
};

// By one thread: keys and values of all tiles.
template <int kHead>
__device__ __forceinline__ void copy_keys(const AttentionForwardLaunch& launch, const ForwardShared<kHead>& shared) {
  using Tile = typename ForwardShared<kHead>::Tile;
  typename ForwardShared<kHead>::Keys::Place at;
  QuerySchedule schedule(launch.problem);
  QueryTile tile;
  const auto group = static_cast<int>(launch.problem.sizes.heads_q / launch.problem.sizes.heads_k);
  while (schedule.next(tile)) {
    const int head = tile.head / group;
    for (KeyBlocks blocks(launch.problem, tile); blocks.next(); at.advance()) {
      shared.keys.wait_empty(at);
      sm90::arrive_and_expect(shared.keys.full(at), Tile::kBytes);
      Tile::copy(shared.keys.tile(at), &launch.k, shared.keys.full(at), tile.batch, head, blocks.row());
      shared.values.wait_empty(at);
      sm90::arrive_and_expect(shared.values.full(at), Tile::kBytes);
      Tile::copy(shared.values.tile(at), &launch.v, shared.values.full(at), tile.batch, head, blocks.row());
    }
  }
}

// 8 numbers of a head and the 8 they are rotated with; NaN for a position outside of the tables.
template <int kHead>
__device__ __forceinline__ void rotate_unit(const AttentionTables& tables, int position, int unit, float (&first)[8],
                                            float (&second)[8]) {
  float cos[8], sin[8];
  const bool known = position >= 0 && position < tables.rows;
  const std::int64_t from = known ? std::int64_t{position} * (kHead / 2) + 8 * unit : 8 * unit;
  unpack(load<8>(tables.cos + from), cos);
  unpack(load<8>(tables.sin + from), sin);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x1 = first[i], x2 = second[i];
    first[i] = known ? x1 * cos[i] - x2 * sin[i] : NAN;
    second[i] = known ? x2 * cos[i] + x1 * sin[i] : NAN;
  }
}

// The tile's rows as a segment of keys wants them; 0 for rows that are none.
template <typename T, int kHead>
__device__ __forceinline__ void write_queries(const AttentionForwardLaunch& launch, const QueryTile& tile, int segment,
                                              std::uint32_t destination) {
  using Tile = typename ForwardShared<kHead>::Tile;
  constexpr int kUnits = kHead / 16;
  const AttentionHeads& q = launch.q;
  const T* base = static_cast<const T*>(q.data) + tile.batch * q.batch_stride + tile.head * q.head_stride;
  const std::int64_t first_row = std::int64_t{tile.first_query} + tile.begin - tile.query_start;
  for (int i = static_cast<int>(threadIdx.x) - 32; i < kAttentionTileRows * kUnits; i += kQueryWarpThreads) {
    const int row = i / kUnits, unit = i % kUnits, position = tile.begin + row;
    float first[8] = {}, second[8] = {};
    if (position >= tile.query_start && position < tile.end) {
      const T* source = base + (first_row + row) * q.row_stride + 8 * unit;
      unpack(load<8>(source), first);
      unpack(load<8>(source + kHead / 2), second);
      if (launch.problem.tables.cos != nullptr) {
        const int angle = query_position(segment, position - tile.chunk_begin, launch.problem.chunks);
        rotate_unit<kHead>(launch.problem.tables, angle, unit, first, second);
      }
    }
    sm90::store_16_bytes(destination + Tile::offset(row, unit), pack<T>(first).access[0]);
    sm90::store_16_bytes(destination + Tile::offset(row, unit + kUnits), pack<T>(second).access[0]);
  }
}

// By the warps of queries: operands of all tiles.
template <typename T, int kHead>
__device__ __forceinline__ void rotate_queries(const AttentionForwardLaunch& launch,
                                               const ForwardShared<kHead>& shared) {
  typename ForwardShared<kHead>::Queries::Place at;
  QuerySchedule schedule(launch.problem);
  QueryTile tile;
  while (schedule.next(tile)) {
    for (KeyBlocks blocks(launch.problem, tile); blocks.next_segment();) {
      if (!blocks.wants_queries()) continue;
      shared.queries.wait_empty(at);
      write_queries<T, kHead>(launch, tile, blocks.segment(), sm90::shared_address(shared.queries.tile(at)));
      sm90::fence_for_async_proxy();
      sm90::arrive(shared.queries.full(at));
      at.advance();
    }
  }
}

// Values of keys at and beyond `end` become 0, as their probabilities are: they may be another sequence's, and
// anything. By all threads that multiply, before either of their groups reads the block.
template <int kHead>
__device__ __forceinline__ void clear_values(unsigned char* values, int key, int end) {
  using Tile = typename ForwardShared<kHead>::Tile;
  if (key + kAttentionTileRows <= end) return;
  constexpr int kChunks = kHead / 8;
  const std::uint32_t address = sm90::shared_address(values);
  for (int i = (end - key) * kChunks + static_cast<int>(threadIdx.x) - kCopyThreads; i < kAttentionTileRows * kChunks;
       i += kMultiplyThreads) {
    sm90::store_16_bytes(address + Tile::offset(i / kChunks, i % kChunks), uint4{0, 0, 0, 0});
  }
  sm90::fence_for_async_proxy();
  sm90::sync_threads<kMultiplyThreads>(kMultiplyBarrier);
}

// One warpgroup's rows.
template <typename T, int kHead>
class ForwardRows {
 public:
  using Shared = ForwardShared<kHead>;
  using Tile = typename Shared::Tile;

  __device__ __forceinline__ ForwardRows(const AttentionForwardLaunch& launch, const Shared& shared)
      : launch_(launch), shared_(shared), group_(static_cast<int>(threadIdx.x) / 128 - 1) {
    // The first group multiplies first.
    if (group_ == 1) sm90::arrive_threads<kMultiplyThreads>(kTurnBarrier);
  }

  // Output and lse of a tile.
  __device__ __forceinline__ void run(const QueryTile& tile) {
    SoftmaxRows rows;
    const int first = tile.begin + 64 * group_;
    const int position = tile.begin + first_row_of_thread();
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.scale[half] = scale_of(tile, position + 8 * half);
    float out[kHead / 2] = {};
    KeyBlocks blocks(launch_.problem, tile);
    if (blocks.next()) {
      Logits logits;
      std::uint32_t probabilities[kLogits / 8][4];
      float decay[2];
      shared_.queries.wait_full(query_);
      shared_.keys.wait_full(key_);
      sm90::pin(logits);
      begin_turn();
      multiply_keys(logits);
      end_turn();
      sm90::wait_for_multiplications<0>();
      sm90::pin(logits);
      shared_.keys.release(key_);
      mask_logits(logits, blocks.key(), blocks.end(), first, position);
      rows.fold(logits, decay);
      to_operands<T>(logits, probabilities);
      int key = blocks.key(), end = blocks.end();
      while (blocks.next()) {
        if (blocks.wants_queries()) {
          shared_.queries.release(query_);
          shared_.queries.wait_full(query_);
        }
        shared_.values.wait_full(value_);
        clear_values<kHead>(shared_.values.tile(value_), key, end);
        shared_.keys.wait_full(key_);
        sm90::pin(logits);
        sm90::pin(out);
        sm90::pin(probabilities);
        begin_turn();
        multiply_keys(logits);
        multiply_values(out, probabilities);
        end_turn();
        sm90::wait_for_multiplications<1>();
        sm90::pin(logits);
        shared_.keys.release(key_);
        key = blocks.key();
        end = blocks.end();
        mask_logits(logits, key, end, first, position);
        rows.fold(logits, decay);
        sm90::wait_for_multiplications<0>();
        sm90::pin(out);
        sm90::pin(probabilities);
        shared_.values.release(value_);
        scale_rows(out, decay);
        to_operands<T>(logits, probabilities);
      }
      shared_.queries.release(query_);
      shared_.values.wait_full(value_);
      clear_values<kHead>(shared_.values.tile(value_), key, end);
      sm90::pin(out);
      sm90::pin(probabilities);
      sm90::begin_multiplications();
      multiply_values(out, probabilities);
      sm90::wait_for_multiplications<0>();
      sm90::pin(out);
      sm90::pin(probabilities);
      shared_.values.release(value_);
    }
    finish(tile, rows, out);
  }

 private:
  // Groups take turns at the tensor cores, so that one has its softmax while the other multiplies.
  __device__ __forceinline__ void begin_turn() const {
    sm90::sync_threads<kMultiplyThreads>(kTurnBarrier + group_);
    sm90::begin_multiplications();
  }
  __device__ __forceinline__ void end_turn() const {
    sm90::arrive_threads<kMultiplyThreads>(kTurnBarrier + 1 - group_);
  }

  __device__ __forceinline__ void multiply_keys(Logits& logits) const {
    const std::uint32_t queries = sm90::shared_address(shared_.queries.tile(query_)) + group_ * kBoxBytes;
    const std::uint32_t keys = sm90::shared_address(shared_.keys.tile(key_));
#pragma unroll
    for (int step = 0; step < kHead / 16; ++step) {
      sm90::multiply<T, false, false>(logits, Tile::along_head(queries, step), Tile::along_head(keys, step), step != 0);
    }
    sm90::commit_multiplications();
  }

  __device__ __forceinline__ void multiply_values(float (&out)[kHead / 2],
                                                  const std::uint32_t (&probabilities)[kLogits / 8][4]) const {
    const std::uint32_t values = sm90::shared_address(shared_.values.tile(value_));
#pragma unroll
    for (int step = 0; step < kAttentionTileRows / 16; ++step) {
      sm90::multiply_registers<T, true>(out, probabilities[step], Tile::along_rows(values, step), true);
    }
    sm90::commit_multiplications();
  }

  __device__ __forceinline__ static bool is_row(const QueryTile& tile, int position) {
    return position >= tile.query_start && position < tile.end;
  }
  __device__ __forceinline__ static std::int64_t row_of(const QueryTile& tile, int position) {
    return std::int64_t{tile.first_query} + position - tile.query_start;
  }

  __device__ __forceinline__ float scale_of(const QueryTile& tile, int position) const {
    const AttentionProblem& problem = launch_.problem;
    const float scale = problem.scale * kLog2E;
    if (problem.logit_scale == nullptr || !is_row(tile, position)) return scale;
    return scale * __ldg(problem.logit_scale + row_of(tile, position));
  }

  __device__ __forceinline__ void finish(const QueryTile& tile, const SoftmaxRows& rows,
                                         float (&out)[kHead / 2]) const {
    const AttentionSizes& sizes = launch_.problem.sizes;
    const std::int64_t first_head = tile.batch * sizes.heads_q + tile.head;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = tile.begin + first_row_of_thread() + 8 * half;
      const bool exists = is_row(tile, position);
      const std::int64_t row = row_of(tile, position);
      const float total = sum_of_row(rows.total[half]);
      const bool has_keys = total != 0.0f;
      const float factor = has_keys ? 1.0f / total : 1.0f;
      if (exists && threadIdx.x % 4 == 0) {
        const float lse[1] = {has_keys ? (rows.largest[half] + log2f(total)) * kLn2 : -INFINITY};
        store(launch_.lse + first_head * sizes.rows_q + row, pack<float>(lse));
      }
      T* destination =
          static_cast<T*>(launch_.out) + ((tile.batch * sizes.rows_q + row) * sizes.heads_q + tile.head) * kHead;
#pragma unroll
      for (int block = 0; block < kHead / 32; ++block) {
        float columns[8];
        gather_columns(out, block, half, columns);
        if (!exists) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) columns[i] *= factor;
        store_whole(destination + 32 * block + 8 * (threadIdx.x % 4), pack<T>(columns));
      }
    }
  }

  const AttentionForwardLaunch& launch_;
  const Shared& shared_;
  int group_;
  typename Shared::Queries::Place query_;
  typename Shared::Keys::Place key_, value_;
};

template <typename T, int kHead>
__global__ __launch_bounds__(kGemmThreads,
                             1) void attention_forward_kernel(const __grid_constant__ AttentionForwardLaunch launch) {
#if MEGATRON_QWEN_SM90
  const ForwardShared<kHead> shared(sm90::dynamic_shared());
  if (threadIdx.x < kCopyThreads) {
    sm90::give_up_registers<kForwardCopyRegisters>();
    if (threadIdx.x == 0) copy_keys<kHead>(launch, shared);
    if (threadIdx.x >= 32) rotate_queries<T, kHead>(launch, shared);
  } else {
    sm90::take_registers<kForwardMultiplyRegisters>();
    ForwardRows<T, kHead> rows(launch, shared);
    QuerySchedule schedule(launch.problem);
    QueryTile tile;
    while (schedule.next(tile)) rows.run(tile);
  }
#endif
}

}  // namespace megatron_qwen
