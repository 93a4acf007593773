#include <memory>
#include <stdexcept>
#include <string>

#include "attention_backward_keys.cuh"
#include "attention_backward_queries.cuh"
#include "attention_backward_rows.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"

namespace megatron_qwen {
namespace {

template <int kSize>
struct HeadTag {
  static constexpr int kHead = kSize;
};

// Calls launch with tags of the 16-bit type and of the size of heads.
template <typename Launch>
void dispatch_heads(const AttentionProblem& problem, Launch&& launch) {
  dispatch_16_bits(problem.dtype, [&](auto type) {
    if (problem.sizes.head_dim == 64) return launch(type, HeadTag<64>{});
    launch(type, HeadTag<128>{});
  });
}

std::unique_ptr<BackwardPass> pass_of(const char* op, const AttentionBackwardInputs& inputs) {
  const AttentionProblem& problem = inputs.problem;
  const AttentionSizes& sizes = problem.sizes;
  auto pass = std::make_unique<BackwardPass>();
  pass->problem = problem;
  pass->queries = inputs.queries;
  pass->k = inputs.k;
  pass->v = inputs.v;
  pass->grad = inputs.grad;
  pass->exponents = inputs.exponents;
  pass->deltas = inputs.deltas;
  const auto describe = [&](const AttentionHeads& heads, std::int64_t batch, std::int64_t rows, std::int64_t count) {
    return head_map(op, heads, batch, rows, count, sizes.head_dim, kStepRows, problem.dtype);
  };
  const std::int64_t copies = problem.chunks.is_plain ? 1 : 3;
  pass->queries_map = describe(pass->queries, copies * sizes.batch, sizes.rows_q, sizes.heads_q);
  pass->grad_map = describe(pass->grad, sizes.batch, sizes.rows_q, sizes.heads_q);
  pass->k_map = describe(pass->k, sizes.batch, sizes.rows_k, sizes.heads_k);
  pass->v_map = describe(pass->v, sizes.batch, sizes.rows_k, sizes.heads_k);
  return pass;
}

template <typename Params, typename Kernel>
void launch_rows(const char* op, const Params& params, Kernel* kernel, std::int64_t threads_per_head) {
  const std::int64_t threads = params.batch * params.rows * params.heads * threads_per_head;
  const std::int64_t blocks = ceil_divide(threads, kRowThreads);
  require_at_most(op, "blocks", blocks, kMaxBlocks);
  launch(op, kernel, blocks, kRowThreads, params.stream, params);
}

}  // namespace

void attention_rotate(const AttentionRotateParams& params) {
  constexpr const char* kOp = "attention_rotate";
  check(params);
  dispatch_16_bits(params.dtype, [&](auto tag) {
    launch_rows(kOp, params, attention_rotate_kernel<typename decltype(tag)::type>, params.head_dim / 16);
  });
}

void attention_row_terms(const AttentionRowTermsParams& params) {
  constexpr const char* kOp = "attention_row_terms";
  check(params);
  dispatch_16_bits(params.dtype, [&](auto tag) {
    launch_rows(kOp, params, attention_row_terms_kernel<typename decltype(tag)::type>, params.head_dim / 8);
  });
}

void attention_keys_backward(const AttentionKeysBackwardParams& params) {
  constexpr const char* kOp = "attention_keys_backward";
  check(params);
  require_sm90(kOp);
  const AttentionProblem& problem = params.inputs.problem;
  const auto pass = pass_of(kOp, params.inputs);
  pass->turns_back = params.turns_back;
  pass->out = params.dk;
  pass->second_out = params.dv;
  dispatch_heads(problem, [&](auto type, auto head) {
    constexpr int kHead = decltype(head)::kHead;
    launch_with_shared(kOp, attention_keys_backward_kernel<typename decltype(type)::type, kHead>,
                       problem.tiles.slots * problem.sizes.heads_k, kGemmThreads, KeysShared<kHead>::kBytes,
                       problem.stream, *pass);
  });
}

void attention_queries_backward(const AttentionQueriesBackwardParams& params) {
  constexpr const char* kOp = "attention_queries_backward";
  check(params);
  require_sm90(kOp);
  const AttentionProblem& problem = params.inputs.problem;
  const auto pass = pass_of(kOp, params.inputs);
  pass->turns_back = problem.tables.cos != nullptr;
  pass->out = params.dq;
  dispatch_heads(problem, [&](auto type, auto head) {
    constexpr int kHead = decltype(head)::kHead;
    launch_with_shared(kOp, attention_queries_backward_kernel<typename decltype(type)::type, kHead>,
                       problem.tiles.slots * problem.sizes.heads_q, kGemmThreads, QueriesShared<kHead>::kBytes,
                       problem.stream, *pass);
  });
}

}  // namespace megatron_qwen
