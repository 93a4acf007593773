#include <sstream>
#include <stdexcept>
#include <string>

#include "megatron_qwen/check.h"
#include "megatron_qwen/grouped_mlp.h"

namespace megatron_qwen {
namespace {

// Rows are coordinates of TMA, and counted in 32 bits.
constexpr std::int64_t kMostRows = (std::int64_t{1} << 31) - 1;
// A thread has 16 bytes of a row.
constexpr std::int64_t kColumnStep = 8;
constexpr std::int64_t kMostColumns = std::int64_t{1} << 30;

void require_columns(const char* op, const char* name, std::int64_t value) {
  require_at_least(op, name, value, kColumnStep);
  require_at_most(op, name, value, kMostColumns);
  if (value % kColumnStep == 0) return;
  std::ostringstream message;
  message << op << ": " << name << " = " << value << "; expected a multiple of " << kColumnStep;
  throw std::invalid_argument(message.str());
}

void check_groups(const char* op, const ExpertGroups& groups) {
  if (groups.dtype == DType::kFloat32) {
    throw std::invalid_argument(std::string(op) + ": dtype is float32; expected bfloat16 or float16");
  }
  require_at_least(op, "experts", groups.experts, 1);
  require_at_least(op, "routed", groups.routed, 1);
  require_at_most(op, "routed", groups.routed, kMostRows);
  require_at_least(op, "shared_tokens", groups.shared_tokens, 0);
  require_at_most(op, "shared_tokens", groups.shared_tokens, kMostRows - groups.routed);
  require_at_most(op, "experts", groups.experts, kMostGroups - (groups.shared_tokens != 0 ? 1 : 0));
  require_columns(op, "size", groups.size);
  require_columns(op, "width", groups.width);
  if (groups.shared_tokens != 0) require_columns(op, "shared_width", groups.shared_width);
  require_aligned(op, "offsets", groups.offsets, 8);
}

void check_gathers(const char* op, const ExpertGroups& groups) {
  require_aligned(op, "tokens", groups.tokens, 4);
  require_at_least(op, "x_rows", groups.x_rows, 1);
}

void check_matrices(const char* op, const char* name, const ExpertGroups& groups, const void* const* matrices) {
  require_pointer(op, name, matrices);
  const std::int64_t count = groups.experts + (groups.shared_tokens != 0 ? 1 : 0);
  for (std::int64_t i = 0; i < count; ++i) {
    require_aligned(op, (std::string(name) + "[" + std::to_string(i) + "]").c_str(), matrices[i], kVectorBytes);
  }
}

void check_factor(const char* op, std::int64_t factor) {
  require_at_least(op, "factor", factor, 1);
  require_at_most(op, "factor", factor, 2);
}

}  // namespace

void check(const GroupedUpParams& params) {
  constexpr const char* kOp = "grouped_up";
  check_groups(kOp, params.groups);
  check_gathers(kOp, params.groups);
  check_matrices(kOp, "fc1", params.groups, params.fc1);
  require_aligned(kOp, "x", params.x, kVectorBytes);
  if (params.packed != nullptr) require_aligned(kOp, "packed", params.packed, kVectorBytes);
  if (params.hidden != nullptr) require_aligned(kOp, "hidden", params.hidden, kVectorBytes);
}

void check(const GroupedDownParams& params) {
  constexpr const char* kOp = "grouped_down";
  check_groups(kOp, params.groups);
  check_matrices(kOp, "matrices", params.groups, params.matrices);
  check_factor(kOp, params.factor);
  require_aligned(kOp, "a", params.a, kVectorBytes);
  require_aligned(kOp, "out", params.out, kVectorBytes);
  if (params.row_weights != nullptr) require_aligned(kOp, "row_weights", params.row_weights, 4);
}

void check(const GroupedActivationBackwardParams& params) {
  constexpr const char* kOp = "grouped_activation_backward";
  check_groups(kOp, params.groups);
  check_gathers(kOp, params.groups);
  check_matrices(kOp, "fc2", params.groups, params.fc2);
  require_aligned(kOp, "grad", params.grad, kVectorBytes);
  require_aligned(kOp, "row_weights", params.row_weights, 4);
  require_aligned(kOp, "packed", params.packed, kVectorBytes);
  require_aligned(kOp, "grad_packed", params.grad_packed, kVectorBytes);
  require_aligned(kOp, "hidden", params.hidden, kVectorBytes);
  require_aligned(kOp, "partial", params.partial, 4);
}

void check(const GroupedWeightGradientParams& params) {
  constexpr const char* kOp = "grouped_weight_gradient";
  check_groups(kOp, params.groups);
  check_gathers(kOp, params.groups);
  check_matrices(kOp, "out", params.groups, params.out);
  check_factor(kOp, params.factor);
  require_aligned(kOp, "flat", params.flat, kVectorBytes);
  require_aligned(kOp, "x", params.x, kVectorBytes);
  if (params.out_dtype == params.groups.dtype || params.out_dtype == DType::kFloat32) return;
  throw std::invalid_argument(std::string(kOp) + ": out_dtype is " + name_of(params.out_dtype) + "; expected " +
                              name_of(params.groups.dtype) + " or float32");
}

}  // namespace megatron_qwen
