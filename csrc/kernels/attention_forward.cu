#include <algorithm>

#include "attention_forward.cuh"
#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"

namespace megatron_qwen {
namespace {

template <typename T, int kHead>
void start_forward(const char* op, const AttentionForwardLaunch& launch) {
  const AttentionProblem& problem = launch.problem;
  // As many blocks as multiprocessors: the ring fills the shared memory of one.
  const std::int64_t items = problem.tiles.slots * problem.sizes.heads_q;
  const std::int64_t blocks = std::min(items, std::int64_t{num_multiprocessors(op)});
  launch_with_shared(op, attention_forward_kernel<T, kHead>, blocks, kGemmThreads, ForwardShared<kHead>::kBytes,
                     problem.stream, launch);
}

}  // namespace

void attention_forward(const AttentionForwardParams& params) {
  constexpr const char* kOp = "attention_forward";
  check(params);
  require_sm90(kOp);
  const AttentionProblem& problem = params.problem;
  const AttentionSizes& sizes = problem.sizes;
  const auto map = [&](const AttentionHeads& heads) {
    if (sizes.rows_k == 0) return CUtensorMap{};
    return head_map(kOp, heads, sizes.batch, sizes.rows_k, sizes.heads_k, sizes.head_dim, kAttentionTileRows,
                    problem.dtype);
  };
  const AttentionForwardLaunch launch{problem, params.q, params.out, params.lse, map(params.k), map(params.v)};
  dispatch_16_bits(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (sizes.head_dim == 64) return start_forward<T, 64>(kOp, launch);
    start_forward<T, 128>(kOp, launch);
  });
}

}  // namespace megatron_qwen
