// Gradient of queries, by tiles of 128 rows of one head:
//
//   S = Q K^T,  P = exp2(S - exponent),  dS = P (dO V^T - delta),  dQ += dS K
//
// over the keys of up to three segments, in each of which the rows have other angles: Q comes anew, and the one sum dQ
// is turned on from the angles of one segment to those of the next, so it needs no memory. A step has 64 keys.
#pragma once

#include "attention_backward_product.cuh"

namespace megatron_qwen {

constexpr int kQueriesStages = 3;
// A copy of the queries per segment, and the gradient of the output.
template <int kHead>
using QueriesShared = BackwardShared<kHead, 4, kQueriesStages>;
constexpr int kGradTile = 3;

// By the first warp.
template <int kHead>
__device__ __forceinline__ void copy_for_queries(const BackwardPass& pass, const AttentionTile& tile, int head,
                                                 const QueriesShared<kHead>& shared) {
  const AttentionSizes& sizes = pass.problem.sizes;
  const int first_segment = pass.problem.chunks.is_plain ? kOwnChunk : kOlderChunks;
  const int row = tile.first_query + tile.begin - tile.query_start;
  const int head_k = head / static_cast<int>(sizes.heads_q / sizes.heads_k);
  const StreamedHead keys{&pass.k_map, &pass.k, tile.batch, head_k}, values{&pass.v_map, &pass.v, tile.batch, head_k};
  if (threadIdx.x == 0) copy_fixed(shared, kGradTile, &pass.grad_map, tile.batch, head, row);
  typename QueriesShared<kHead>::Turn turn;
  for (int segment = first_segment; segment <= kOwnChunk; ++segment) {
    const Range range = tile.keys_of_segment(segment, static_cast<int>(pass.problem.chunks.stride));
    if (range.low >= range.high) continue;
    if (threadIdx.x == 0) {
      const int copy = (segment - first_segment) * static_cast<int>(sizes.batch) + tile.batch;
      copy_fixed(shared, segment, &pass.queries_map, copy, head, row);
    }
    for (int key = range.low; key < range.high; key += kStepRows) {
      sm90::wait(shared.empty(turn.stage), turn.parity ^ 1);
      copy_step<kHead>(shared, turn.stage, keys, values,
                       StreamedRows{tile.first_key + key - tile.key_start, min(range.high - key, kStepRows)});
      arrive_filled(shared, turn.stage);
      turn.advance();
    }
  }
}

// Of the two rows a thread has numbers of.
struct RowTerms {
  int position[2];
  bool exists[2];
  float exponent[2], delta[2], factor[2], logit_scale[2];
};

__device__ __forceinline__ RowTerms row_terms(const BackwardPass& pass, const AttentionTile& tile, int head) {
  const AttentionSizes& sizes = pass.problem.sizes;
  RowTerms terms;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int position = tile.begin + first_row_of_thread() + 8 * h;
    const bool exists = position >= tile.query_start && position < tile.end;
    const std::int64_t row = exists ? tile.first_query + position - tile.query_start : 0;
    const std::int64_t place = (tile.batch * sizes.heads_q + head) * sizes.rows_q + row;
    const float* scales = pass.problem.logit_scale;
    terms.position[h] = position;
    terms.exists[h] = exists;
    terms.exponent[h] = exists ? __ldg(pass.exponents + place) : 0.0f;
    terms.delta[h] = exists ? __ldg(pass.deltas + place) : 0.0f;
    terms.logit_scale[h] = exists && scales != nullptr ? __ldg(scales + row) : 1.0f;
    terms.factor[h] = terms.logit_scale[h] * (pass.problem.scale * kLog2OfE);
  }
  return terms;
}

// 0 from key limit[which row] + 1 on.
__device__ __forceinline__ void mask_keys_behind(float (&product)[kStepAccumulators], int key, const int (&limit)[2]) {
#pragma unroll
  for (int i = 0; i < kStepAccumulators; ++i) {
    const int column = i / 4 * 8 + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2;
    if (key + column > limit[i / 2 % 2]) product[i] = 0.0f;
  }
}

// Turns the sum on from the angles of segment `from` to those of `to`: by conj(a) / conj(b), so that conj(b) in the end
// amounts to conj(a), also of tables with a factor in them.
template <int kHead>
__device__ __forceinline__ void turn_on(const BackwardPass& pass, const AttentionTile& tile, const RowTerms& terms,
                                        int from, int to, float (&dq)[kHeadAccumulators<kHead>]) {
  const AttentionTables& tables = pass.problem.tables;
  turn_back<kHead>(dq, [&](int h, int column) {
    const int within = terms.position[h] - tile.chunk_begin;
    const Angles a = angles_at(tables, query_position(from, within, pass.problem.chunks), kHead / 2, column);
    const Angles b = angles_at(tables, query_position(to, within, pass.problem.chunks), kHead / 2, column);
    Angles both;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float size = 1.0f / (b.cos[i] * b.cos[i] + b.sin[i] * b.sin[i]);
      both.cos[i] = (a.cos[i] * b.cos[i] + a.sin[i] * b.sin[i]) * size;
      both.sin[i] = (a.sin[i] * b.cos[i] - a.cos[i] * b.sin[i]) * size;
    }
    return both;
  });
}

template <typename T, int kHead>
__device__ __forceinline__ void store_queries(const BackwardPass& pass, const AttentionTile& tile, int head,
                                              const RowTerms& terms, const float (&dq)[kHeadAccumulators<kHead>]) {
  const AttentionSizes& sizes = pass.problem.sizes;
  const std::int64_t row = tile.batch * sizes.rows_q + tile.first_query + terms.position[0] - tile.query_start;
  store_rows<T, kHead>(static_cast<T*>(pass.out) + (row * sizes.heads_q + head) * kHead, sizes.heads_q * kHead,
                       terms.exists, dq);
}

// Adds what the keys of a segment contribute; the last multiplications are done, and the last stage is handed back.
template <typename T, int kHead>
__device__ __forceinline__ void add_segment(const QueriesShared<kHead>& shared, const Range& range, bool is_own_chunk,
                                            int segment, const RowTerms& terms,
                                            typename QueriesShared<kHead>::Turn& turn,
                                            float (&dq)[kHeadAccumulators<kHead>]) {
  const int half = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool releases = threadIdx.x % 32 == 0;
  const std::uint32_t q = sm90::shared_address(shared.fixed(segment, half));
  const std::uint32_t grad = sm90::shared_address(shared.fixed(kGradTile, half));
  // Keys that all rows of the warpgroup see.
  const int first_row = terms.position[0] - first_row_of_thread() + kStepRows * half;
  int limit[2], before = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) limit[h] = is_own_chunk ? min(terms.position[h], range.high - 1) : range.high - 1;
  const int unmasked = is_own_chunk ? min(first_row, range.high - 1) : range.high - 1;
  float p[kStepAccumulators], ds[kStepAccumulators];
  std::uint32_t operands[kStepRows / 16][4];
  const auto finish_products = [&](int key) {
#pragma unroll
    for (int i = 0; i < kStepAccumulators; ++i) {
      const int h = i / 2 % 2;
      p[i] = sm90::exp2_fast(p[i] * terms.factor[h] - terms.exponent[h]);
      ds[i] = p[i] * (ds[i] - terms.delta[h]);
    }
    if (key + kStepRows - 1 > unmasked) mask_keys_behind(ds, key, limit);
  };
  const auto multiply_both = [&] {
    multiply_heads<T, kHead>(p, q, sm90::shared_address(shared.first(turn.stage)));
    multiply_heads<T, kHead>(ds, grad, sm90::shared_address(shared.second(turn.stage)));
  };
  const auto add_keys = [&] { add_rows<T, kHead>(dq, operands, sm90::shared_address(shared.first(before)), true); };
  sm90::wait(shared.full(turn.stage), turn.parity);
  sm90::begin_multiplications();
  multiply_both();
  sm90::wait_for_multiplications<0>();
  sm90::pin(p);
  sm90::pin(ds);
  finish_products(range.low);
  to_operands<T>(ds, operands);
  before = turn.stage;
  turn.advance();
  // Each step's last product runs beside the next one's first two, and beside what is done with those.
  for (int key = range.low + kStepRows; key < range.high; key += kStepRows) {
    sm90::wait(shared.full(turn.stage), turn.parity);
    sm90::pin(p);
    sm90::pin(ds);
    sm90::pin(dq);
    sm90::pin(operands);
    sm90::begin_multiplications();
    multiply_both();
    add_keys();
    sm90::wait_for_multiplications<1>();
    sm90::pin(p);
    sm90::pin(ds);
    finish_products(key);
    sm90::wait_for_multiplications<0>();
    sm90::pin(dq);
    sm90::pin(operands);
    if (releases) sm90::arrive(shared.empty(before));
    to_operands<T>(ds, operands);
    before = turn.stage;
    turn.advance();
  }
  sm90::pin(dq);
  sm90::pin(operands);
  sm90::begin_multiplications();
  add_keys();
  sm90::wait_for_multiplications<0>();
  sm90::pin(dq);
  sm90::pin(operands);
  if (releases) sm90::arrive(shared.empty(before));
}

template <typename T, int kHead>
__device__ __forceinline__ void multiply_for_queries(const BackwardPass& pass, const AttentionTile& tile, int head,
                                                     const QueriesShared<kHead>& shared) {
  const RowTerms terms = row_terms(pass, tile, head);
  float dq[kHeadAccumulators<kHead>] = {};
  typename QueriesShared<kHead>::Turn turn;
  int last_segment = -1;
  sm90::wait(shared.ready(kGradTile), 0);
  for (int segment = pass.problem.chunks.is_plain ? kOwnChunk : kOlderChunks; segment <= kOwnChunk; ++segment) {
    const Range range = tile.keys_of_segment(segment, static_cast<int>(pass.problem.chunks.stride));
    if (range.low >= range.high) continue;
    if (last_segment >= 0 && pass.turns_back) turn_on<kHead>(pass, tile, terms, last_segment, segment, dq);
    sm90::wait(shared.ready(segment), 0);
    add_segment<T, kHead>(shared, range, segment == kOwnChunk, segment, terms, turn, dq);
    last_segment = segment;
  }
#pragma unroll
  for (int i = 0; i < kHeadAccumulators<kHead>; ++i) dq[i] *= pass.problem.scale * terms.logit_scale[i / 2 % 2];
  if (pass.turns_back && last_segment >= 0) {
    turn_back<kHead>(dq, [&](int h, int column) {
      const int angle = query_position(last_segment, terms.position[h] - tile.chunk_begin, pass.problem.chunks);
      return angles_at(pass.problem.tables, angle, kHead / 2, column);
    });
  }
  store_queries<T, kHead>(pass, tile, head, terms, dq);
}

template <typename T, int kHead>
__global__ __launch_bounds__(kGemmThreads,
                             1) void attention_queries_backward_kernel(const __grid_constant__ BackwardPass pass) {
#if MEGATRON_QWEN_SM90
  const int heads = static_cast<int>(pass.problem.sizes.heads_q);
  const int slot = static_cast<int>(blockIdx.x) / heads, head = static_cast<int>(blockIdx.x) - slot * heads;
  AttentionTile tile;
  if (!find_tile(pass.problem, slot, false, tile)) return;
  const QueriesShared<kHead> shared;
  if (threadIdx.x < kCopyThreads) {
    sm90::give_up_registers<kCopyRegisters<true>>();
    if (threadIdx.x < 32) copy_for_queries<kHead>(pass, tile, head, shared);
  } else {
    sm90::take_registers<kMultiplyRegisters<true>>();
    multiply_for_queries<T, kHead>(pass, tile, head, shared);
  }
#endif
}

}  // namespace megatron_qwen
