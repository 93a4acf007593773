#include <algorithm>

#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"
#include "megatron_qwen/column_sum.h"
#include "megatron_qwen/rms_norm.h"
#include "rms_norm_backward.cuh"
#include "rms_norm_forward.cuh"

namespace megatron_qwen {
namespace {

constexpr const char* kForward = "rms_norm_forward";
constexpr const char* kBackward = "rms_norm_backward";

// Threads of a block that hold `held` elements of a row each; the last warp may be partly idle.
inline int threads_that_hold(std::int64_t hidden, int held) {
  return static_cast<int>(ceil_divide(ceil_divide(hidden, held), kWarp)) * kWarp;
}

// 16 bytes at a time: every row, and the weight, starts at a multiple of that.
bool rows_are_aligned(const RMSNormForwardParams& params) {
  const std::int64_t width = kVectorBytes / size_of(params.dtype);
  return params.hidden % width == 0 && params.x_stride % width == 0 && params.residual_stride % width == 0 &&
         is_multiple(params.x, kVectorBytes) && is_multiple(params.residual, kVectorBytes) &&
         is_multiple(params.weight, kVectorBytes) && is_multiple(params.y, kVectorBytes) &&
         is_multiple(params.sum, kVectorBytes);
}

template <typename T, bool kAdds>
void launch_for(const RMSNormForwardParams& params) {
  const auto kernel =
      rows_are_aligned(params) ? rms_norm_forward_kernel<T, kAdds> : rms_norm_forward_scalar_kernel<T, kAdds>;
  const int threads = threads_that_hold(params.hidden, kHeldForward);
  // Every block goes on with the next rows, so that all are resident from start to end.
  const std::int64_t blocks = std::min(params.rows, resident_blocks(kForward, kernel, threads));
  launch(kForward, kernel, blocks, threads, params.stream, params);
}

bool rows_are_aligned(const RMSNormBackwardParams& params) {
  const std::int64_t width = kVectorBytes / size_of(params.dtype);
  return params.hidden % width == 0 && params.x_stride % width == 0 && is_multiple(params.grad, kVectorBytes) &&
         is_multiple(params.grad_sum, kVectorBytes) && is_multiple(params.x, kVectorBytes) &&
         is_multiple(params.weight, kVectorBytes) && is_multiple(params.grad_x, kVectorBytes);
}

using BackwardKernel = void (*)(const RMSNormBackwardParams);

struct Backward {
  BackwardKernel kernel;
  int threads;
};

template <typename T, bool kAdds>
Backward choose_of(std::int64_t hidden, bool aligned) {
  const int threads = threads_that_hold(hidden, kHeldBackward);
  if (aligned) {
    if (threads <= kBackwardThreads) return {rms_norm_backward_kernel<T, kHeldBackward, kAdds>, threads};
    // Of fp32 the registers cannot hold a long row.
    if constexpr (sizeof(T) == 2) {
      return {rms_norm_backward_kernel<T, kHeldOfLong, kAdds>, threads_that_hold(hidden, kHeldOfLong)};
    }
  }
  return {rms_norm_backward_scalar_kernel<T, kAdds>, threads};
}

// The first kernel for rows of this length, and the threads of its blocks.
Backward choose(DType dtype, bool adds, std::int64_t hidden, bool aligned) {
  Backward choice{};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    choice = adds ? choose_of<T, true>(hidden, aligned) : choose_of<T, false>(hidden, aligned);
  });
  return choice;
}

}  // namespace

void rms_norm_forward(const RMSNormForwardParams& params) {
  check(params);
  if (params.rows == 0) return;
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.residual != nullptr) return launch_for<T, true>(params);
    launch_for<T, false>(params);
  });
}

std::int64_t rms_norm_backward_programs(std::int64_t rows, std::int64_t hidden, DType dtype, bool adds) {
  require_at_least(kBackward, "rows", rows, 0);
  require_at_least(kBackward, "hidden", hidden, 1);
  require_at_most(kBackward, "hidden", hidden, kRMSNormLargestHidden);
  const Backward choice = choose(dtype, adds, hidden, hidden % (kVectorBytes / size_of(dtype)) == 0);
  return std::min(rows, resident_blocks(kBackward, choice.kernel, choice.threads));
}

void rms_norm_backward(const RMSNormBackwardParams& params) {
  check(params);
  if (params.rows == 0) return;
  const Backward choice = choose(params.dtype, params.grad_sum != nullptr, params.hidden, rows_are_aligned(params));
  launch(kBackward, choice.kernel, params.num_programs, choice.threads, params.stream, params);
  column_sum(
      {params.partial, params.grad_weight, params.num_programs, params.hidden, params.weight_dtype, params.stream});
}

}  // namespace megatron_qwen
