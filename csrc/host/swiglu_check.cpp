#include "megatron_qwen/check.h"
#include "megatron_qwen/swiglu.h"

namespace megatron_qwen {
namespace {

// rows * width, and the same of 2 width, must be a count that 64 bits hold.
constexpr std::int64_t kMostElements = std::int64_t{1} << 60;

// Returns whether there is anything to compute.
bool check_sizes(const char* op, std::int64_t rows, std::int64_t width) {
  require_at_least(op, "rows", rows, 0);
  require_at_least(op, "width", width, 0);
  if (rows == 0 || width == 0) return false;
  require_at_most(op, "rows", rows, kMostElements / width);
  return true;
}

}  // namespace

void check(const SwiGLUForwardParams& params) {
  constexpr const char* kOp = "swiglu_forward";
  if (!check_sizes(kOp, params.rows, params.width)) return;
  require_at_least(kOp, "packed_stride", params.packed_stride, 0);
  require_aligned(kOp, "packed", params.packed, size_of(params.dtype));
  require_aligned(kOp, "out", params.out, size_of(params.dtype));
}

void check(const SwiGLUBackwardParams& params) {
  constexpr const char* kOp = "swiglu_backward";
  if (!check_sizes(kOp, params.rows, params.width)) return;
  require_at_least(kOp, "grad_stride", params.grad_stride, 0);
  require_at_least(kOp, "packed_stride", params.packed_stride, 0);
  require_aligned(kOp, "grad", params.grad, size_of(params.dtype));
  require_aligned(kOp, "packed", params.packed, size_of(params.dtype));
  require_aligned(kOp, "grad_packed", params.grad_packed, size_of(params.dtype));
}

}  // namespace megatron_qwen
