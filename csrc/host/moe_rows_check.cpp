#include <sstream>
#include <stdexcept>
#include <string>

#include "megatron_qwen/check.h"
#include "megatron_qwen/moe_rows.h"

namespace megatron_qwen {
namespace {

constexpr std::int64_t kMostRows = (std::int64_t{1} << 31) - 1;

// Tokens, and the size of their rows.
void check_rows(const char* op, std::int64_t tokens, std::int64_t size, DType dtype) {
  require_at_least(op, "tokens", tokens, 1);
  require_at_most(op, "tokens", tokens, kMostRows);
  require_at_least(op, "size", size, 8);
  if (size % 8 != 0) {
    std::ostringstream message;
    message << op << ": size = " << size << "; expected a multiple of 8";
    throw std::invalid_argument(message.str());
  }
  if (dtype != DType::kFloat32) return;
  throw std::invalid_argument(std::string(op) + ": dtype is float32; expected bfloat16 or float16");
}

}  // namespace

void check(const MoeRowMapParams& params) {
  constexpr const char* kOp = "moe_row_map";
  require_at_least(kOp, "routed", params.routed, 1);
  require_at_least(kOp, "shared_tokens", params.shared_tokens, 0);
  require_at_least(kOp, "topk", params.topk, 1);
  require_at_most(kOp, "routed", params.routed, kMostRows);
  require_at_most(kOp, "shared_tokens", params.shared_tokens, kMostRows - params.routed);
  require_aligned(kOp, "weights", params.weights, 4);
  require_aligned(kOp, "tokens", params.tokens, 4);
  require_aligned(kOp, "row_weights", params.row_weights, 4);
}

void check(const MoeCombineParams& params) {
  constexpr const char* kOp = "moe_combine";
  check_rows(kOp, params.tokens, params.size, params.dtype);
  require_at_least(kOp, "topk", params.topk, 1);
  require_aligned(kOp, "rows", params.rows, kVectorBytes);
  require_aligned(kOp, "positions", params.positions, 8);
  require_aligned(kOp, "out", params.out, kVectorBytes);
  if (params.shared != nullptr) require_aligned(kOp, "shared", params.shared, kVectorBytes);
  if (params.scale != nullptr) require_aligned(kOp, "vector", params.vector, kVectorBytes);
}

void check(const MoeGateParams& params) {
  constexpr const char* kOp = "moe_gate";
  check_rows(kOp, params.tokens, params.size, params.dtype);
  require_aligned(kOp, "x", params.x, kVectorBytes);
  require_aligned(kOp, "vector", params.vector, kVectorBytes);
  require_aligned(kOp, "out", params.out, 4);
}

void check(const MoeGateGradientParams& params) {
  constexpr const char* kOp = "moe_gate_gradient";
  check_rows(kOp, params.tokens, params.size, params.dtype);
  require_at_least(kOp, "programs", params.programs, 1);
  require_at_most(kOp, "programs", params.programs, params.tokens);
  require_aligned(kOp, "scale", params.scale, 4);
  require_aligned(kOp, "x", params.x, kVectorBytes);
  require_aligned(kOp, "partial", params.partial, kVectorBytes);
}

}  // namespace megatron_qwen
