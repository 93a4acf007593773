// Gradients of keys and values, by tiles of 128 keys of one head:
//
//   S^T = K Q^T,  P^T = exp2(S^T - exponent),  dV += P^T dO,  dS^T = P^T (V dO^T - delta),  dK += dS^T Q
//
// over all rows of all query heads of the group, each rotated as these keys are met. Keys and values stay in shared
// memory, sums and P^T and dS^T in registers.
#pragma once

#include "attention_backward_product.cuh"

namespace megatron_qwen {

constexpr int kKeysStages = 4;
template <int kHead>
using KeysShared = BackwardShared<kHead, 2, kKeysStages>;
// What stays.
constexpr int kKeyTile = 0, kValueTile = 1;
// Terms of a row.
constexpr int kExponents = 0, kDeltas = 1, kLogitScales = 2;

// Of rows that meet a tile of keys.
struct RowStep {
  int segment, head;
  int position;  // of the first row
  int count;
};

// Calls visit(RowStep) for all rows that meet a tile, in one order for those who copy and those who multiply.
template <typename Visit>
__device__ __forceinline__ void for_row_steps(const BackwardPass& pass, const AttentionTile& tile, int head_k,
                                              Visit&& visit) {
  const AttentionProblem& problem = pass.problem;
  const int group = static_cast<int>(problem.sizes.heads_q / problem.sizes.heads_k);
  const int stride = static_cast<int>(problem.chunks.stride);
  for (int segment = problem.chunks.is_plain ? kOwnChunk : kOlderChunks; segment <= kOwnChunk; ++segment) {
    const Range rows = tile.rows_of_segment(segment, stride);
    for (int head = head_k * group; head < (head_k + 1) * group; ++head) {
      for (int position = rows.low; position < rows.high; position += kStepRows) {
        visit(RowStep{segment, head, position, min(rows.high - position, kStepRows)});
      }
    }
  }
}

// By a warp: what a step's rows add to or multiply logits by; 0 for rows that are none.
template <typename Shared>
__device__ __forceinline__ void copy_terms(const BackwardPass& pass, const AttentionTile& tile, const RowStep& step,
                                           int row, const Shared& shared, int stage) {
  const AttentionSizes& sizes = pass.problem.sizes;
  const std::int64_t first = (tile.batch * sizes.heads_q + step.head) * sizes.rows_q + row;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kStepRows; i += 32) {
    const bool exists = i < step.count;
    shared.terms(stage, kExponents)[i] = exists ? __ldg(pass.exponents + first + i) : 0.0f;
    shared.terms(stage, kDeltas)[i] = exists ? __ldg(pass.deltas + first + i) : 0.0f;
    if (pass.problem.logit_scale == nullptr) continue;
    shared.terms(stage, kLogitScales)[i] = exists ? __ldg(pass.problem.logit_scale + row + i) : 0.0f;
  }
}

// By the first warp.
template <int kHead>
__device__ __forceinline__ void copy_for_keys(const BackwardPass& pass, const AttentionTile& tile, int head_k,
                                              const KeysShared<kHead>& shared) {
  if (threadIdx.x == 0) {
    const int row = tile.first_key + tile.begin - tile.key_start;
    copy_fixed(shared, kKeyTile, &pass.k_map, tile.batch, head_k, row);
    copy_fixed(shared, kValueTile, &pass.v_map, tile.batch, head_k, row);
  }
  const int first_segment = pass.problem.chunks.is_plain ? kOwnChunk : kOlderChunks;
  const int batches = static_cast<int>(pass.problem.sizes.batch);
  typename KeysShared<kHead>::Turn turn;
  for_row_steps(pass, tile, head_k, [&](const RowStep& step) {
    const int row = tile.first_query + step.position - tile.query_start;
    const int copy = (step.segment - first_segment) * batches + tile.batch;
    sm90::wait(shared.empty(turn.stage), turn.parity ^ 1);
    copy_step<kHead>(shared, turn.stage, StreamedHead{&pass.queries_map, &pass.queries, copy, step.head},
                     StreamedHead{&pass.grad_map, &pass.grad, tile.batch, step.head}, StreamedRows{row, step.count});
    copy_terms(pass, tile, step, row, shared, turn.stage);
    arrive_filled(shared, turn.stage);
    turn.advance();
  });
}

// Visits the numbers of a product whose columns are rows of a step: visit(number, columns' term).
template <typename Visit>
__device__ __forceinline__ void for_columns_of_step(const float* terms, Visit&& visit) {
#pragma unroll
  for (int j = 0; j < kStepRows / 8; ++j) {
    const float2 both = reinterpret_cast<const float2*>(terms)[4 * j + static_cast<int>(threadIdx.x) % 4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      visit(4 * j + 2 * h, both.x);
      visit(4 * j + 2 * h + 1, both.y);
    }
  }
}

// 0 where a key comes after its row. `key` is the thread's first, in positions, and `row` the step's.
__device__ __forceinline__ void mask_rows_before_keys(float (&product)[kStepAccumulators], int key, int row) {
#pragma unroll
  for (int i = 0; i < kStepAccumulators; ++i) {
    const int column = i / 4 * 8 + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2;
    if (key + 8 * (i / 2 % 2) > row + column) product[i] = 0.0f;
  }
}

template <typename T, int kHead>
__device__ __forceinline__ void store_keys(const BackwardPass& pass, const AttentionTile& tile, int head_k, void* out,
                                           const float (&rows)[kHeadAccumulators<kHead>]) {
  const AttentionSizes& sizes = pass.problem.sizes;
  const int key = tile.begin + first_row_of_thread();
  const bool exists[2] = {key >= tile.key_start && key < tile.end, key + 8 >= tile.key_start && key + 8 < tile.end};
  const std::int64_t row = tile.batch * sizes.rows_k + tile.first_key + key - tile.key_start;
  store_rows<T, kHead>(static_cast<T*>(out) + (row * sizes.heads_k + head_k) * kHead, sizes.heads_k * kHead, exists,
                       rows);
}

template <typename T, int kHead>
__device__ __forceinline__ void finish_keys(const BackwardPass& pass, const AttentionTile& tile, int head_k,
                                            float (&dk)[kHeadAccumulators<kHead>],
                                            const float (&dv)[kHeadAccumulators<kHead>]) {
  store_keys<T, kHead>(pass, tile, head_k, pass.second_out, dv);
#pragma unroll
  for (int i = 0; i < kHeadAccumulators<kHead>; ++i) dk[i] *= pass.problem.scale;
  if (pass.turns_back) {
    const int within = tile.begin + first_row_of_thread() - tile.chunk_begin;
    turn_back<kHead>(
        dk, [&](int h, int column) { return angles_at(pass.problem.tables, within + 8 * h, kHead / 2, column); });
  }
  store_keys<T, kHead>(pass, tile, head_k, pass.out, dk);
}

template <typename T, int kHead>
__device__ __forceinline__ void multiply_for_keys(const BackwardPass& pass, const AttentionTile& tile, int head_k,
                                                  const KeysShared<kHead>& shared) {
  const int half = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool releases = threadIdx.x % 32 == 0, has_scales = pass.problem.logit_scale != nullptr;
  const std::uint32_t k = sm90::shared_address(shared.fixed(kKeyTile, half));
  const std::uint32_t v = sm90::shared_address(shared.fixed(kValueTile, half));
  const int key = tile.begin + first_row_of_thread(), last_key = tile.begin + kStepRows * (half + 1) - 1;
  const float scale = pass.problem.scale * kLog2OfE;
  float dk[kHeadAccumulators<kHead>], dv[kHeadAccumulators<kHead>];
  typename KeysShared<kHead>::Turn turn;
  bool started = false;
  sm90::wait(shared.ready(kKeyTile), 0);
  sm90::wait(shared.ready(kValueTile), 0);
  for_row_steps(pass, tile, head_k, [&](const RowStep& step) {
    const std::uint32_t q = sm90::shared_address(shared.first(turn.stage));
    const std::uint32_t grad = sm90::shared_address(shared.second(turn.stage));
    float p[kStepAccumulators], ds[kStepAccumulators];
    std::uint32_t operands[kStepRows / 16][4], more_operands[kStepRows / 16][4];
    sm90::wait(shared.full(turn.stage), turn.parity);
    sm90::begin_multiplications();
    multiply_heads<T, kHead>(p, k, q);
    multiply_heads<T, kHead>(ds, v, grad);
    sm90::wait_for_multiplications<1>();
    sm90::pin(p);
    if (has_scales) for_columns_of_step(shared.terms(turn.stage, kLogitScales), [&](int i, float x) { p[i] *= x; });
    for_columns_of_step(shared.terms(turn.stage, kExponents),
                        [&](int i, float exponent) { p[i] = sm90::exp2_fast(p[i] * scale - exponent); });
    if (step.segment == kOwnChunk && step.position < last_key) mask_rows_before_keys(p, key, step.position);
    sm90::wait_for_multiplications<0>();
    sm90::pin(ds);
    for_columns_of_step(shared.terms(turn.stage, kDeltas), [&](int i, float delta) { ds[i] = p[i] * (ds[i] - delta); });
    if (has_scales) for_columns_of_step(shared.terms(turn.stage, kLogitScales), [&](int i, float x) { ds[i] *= x; });
    to_operands<T>(p, operands);
    to_operands<T>(ds, more_operands);
    sm90::pin(operands);
    sm90::pin(more_operands);
    sm90::pin(dk);
    sm90::pin(dv);
    sm90::begin_multiplications();
    add_rows<T, kHead>(dv, operands, grad, started);
    add_rows<T, kHead>(dk, more_operands, q, started);
    sm90::wait_for_multiplications<0>();
    sm90::pin(dk);
    sm90::pin(dv);
    sm90::pin(operands);
    sm90::pin(more_operands);
    if (releases) sm90::arrive(shared.empty(turn.stage));
    started = true;
    turn.advance();
  });
  if (!started) {
    const float nothing[kHeadAccumulators<kHead>] = {};
    store_keys<T, kHead>(pass, tile, head_k, pass.out, nothing);
    store_keys<T, kHead>(pass, tile, head_k, pass.second_out, nothing);
    return;
  }
  finish_keys<T, kHead>(pass, tile, head_k, dk, dv);
}

template <typename T, int kHead>
__global__ __launch_bounds__(kGemmThreads,
                             1) void attention_keys_backward_kernel(const __grid_constant__ BackwardPass pass) {
#if MEGATRON_QWEN_SM90
  const int heads_k = static_cast<int>(pass.problem.sizes.heads_k);
  const int slot = static_cast<int>(blockIdx.x) / heads_k, head_k = static_cast<int>(blockIdx.x) - slot * heads_k;
  AttentionTile tile;
  if (!find_tile(pass.problem, slot, true, tile)) return;
  const KeysShared<kHead> shared;
  if (threadIdx.x < kCopyThreads) {
    sm90::give_up_registers<kCopyRegisters<true>>();
    if (threadIdx.x < 32) copy_for_keys<kHead>(pass, tile, head_k, shared);
  } else {
    sm90::take_registers<kMultiplyRegisters<true>>();
    multiply_for_keys<T, kHead>(pass, tile, head_k, shared);
  }
#endif
}

}  // namespace megatron_qwen
