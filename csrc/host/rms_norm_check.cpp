#include <sstream>
#include <stdexcept>

#include "megatron_qwen/check.h"
#include "megatron_qwen/rms_norm.h"

namespace megatron_qwen {
namespace {

// rows * hidden must be a count that 64 bits hold.
constexpr std::int64_t kMostRows = std::int64_t{1} << 40;

void check_sizes(const char* op, std::int64_t rows, std::int64_t hidden) {
  require_at_least(op, "rows", rows, 0);
  require_at_most(op, "rows", rows, kMostRows);
  require_at_least(op, "hidden", hidden, 1);
  require_at_most(op, "hidden", hidden, kRMSNormLargestHidden);
}

void check_eps(const char* op, float eps) {
  if (eps >= 0.0f) return;
  std::ostringstream message;
  message << op << ": eps = " << eps << "; expected 0 or more";
  throw std::invalid_argument(message.str());
}

}  // namespace

void check(const RMSNormForwardParams& params) {
  constexpr const char* kOp = "rms_norm_forward";
  const std::int64_t element = size_of(params.dtype);
  check_sizes(kOp, params.rows, params.hidden);
  check_eps(kOp, params.eps);
  if (params.rows == 0) return;
  require_at_least(kOp, "x_stride", params.x_stride, 0);
  require_aligned(kOp, "x", params.x, element);
  require_aligned(kOp, "weight", params.weight, size_of(params.weight_dtype));
  require_aligned(kOp, "y", params.y, element);
  require_aligned(kOp, "inverse_rms", params.inverse_rms, sizeof(float));
  if (params.residual == nullptr) {
    if (params.sum == nullptr) return;
    throw std::invalid_argument("rms_norm_forward: sum is given without residual; expected both or neither");
  }
  require_at_least(kOp, "residual_stride", params.residual_stride, 0);
  require_aligned(kOp, "residual", params.residual, element);
  require_aligned(kOp, "sum", params.sum, element);
}

void check(const RMSNormBackwardParams& params) {
  constexpr const char* kOp = "rms_norm_backward";
  const std::int64_t element = size_of(params.dtype);
  check_sizes(kOp, params.rows, params.hidden);
  if (params.rows == 0) return;
  require_at_least(kOp, "x_stride", params.x_stride, 0);
  require_aligned(kOp, "grad", params.grad, element);
  if (params.grad_sum != nullptr) require_aligned(kOp, "grad_sum", params.grad_sum, element);
  require_aligned(kOp, "x", params.x, element);
  require_aligned(kOp, "weight", params.weight, size_of(params.weight_dtype));
  require_aligned(kOp, "inverse_rms", params.inverse_rms, sizeof(float));
  require_aligned(kOp, "grad_x", params.grad_x, element);
  require_aligned(kOp, "grad_weight", params.grad_weight, size_of(params.weight_dtype));
  require_at_least(kOp, "num_programs", params.num_programs, 1);
  require_at_most(kOp, "num_programs", params.num_programs, params.rows < kMaxBlocks ? params.rows : kMaxBlocks);
  require_aligned(kOp, "partial", params.partial, kVectorBytes);
}

}  // namespace megatron_qwen
