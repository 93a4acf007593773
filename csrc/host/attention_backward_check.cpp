#include <sstream>
#include <stdexcept>
#include <string>

#include "megatron_qwen/attention_backward.h"
#include "megatron_qwen/check.h"

namespace megatron_qwen {
namespace {

void check_rows(const char* op, std::int64_t batch, std::int64_t rows, std::int64_t heads, std::int64_t head_dim,
                DType dtype) {
  require_at_least(op, "batch", batch, 1);
  require_at_least(op, "rows", rows, 1);
  require_at_most(op, "rows", rows, kLongestSequence);
  require_at_least(op, "heads", heads, 1);
  if (dtype == DType::kFloat32) {
    throw std::invalid_argument(std::string(op) + ": dtype is float32; expected bfloat16 or float16");
  }
  if (head_dim == 64 || head_dim == 128) return;
  throw std::invalid_argument(std::string(op) + ": head_dim = " + std::to_string(head_dim) + "; expected 64 or 128");
}

void check_inputs(const char* op, const AttentionBackwardInputs& inputs) {
  check_problem(op, inputs.problem);
  require_at_least(op, "rows_k", inputs.problem.sizes.rows_k, 1);
  require_at_most(op, "slots times heads", inputs.problem.tiles.slots * inputs.problem.sizes.heads_q, kMaxBlocks);
  check_heads(op, "queries", inputs.queries);
  check_heads(op, "k", inputs.k);
  check_heads(op, "v", inputs.v);
  check_heads(op, "grad", inputs.grad);
  require_aligned(op, "exponents", inputs.exponents, 4);
  require_aligned(op, "deltas", inputs.deltas, 4);
}

}  // namespace

void check(const AttentionRotateParams& params) {
  constexpr const char* kOp = "attention_rotate";
  check_rows(kOp, params.batch, params.rows, params.heads, params.head_dim, params.dtype);
  check_heads(kOp, "x", params.x);
  require_aligned(kOp, "cos", params.tables.cos, kVectorBytes);
  require_aligned(kOp, "sin", params.tables.sin, kVectorBytes);
  require_aligned(kOp, "out", params.out, kVectorBytes);
  require_at_least(kOp, "stride", params.chunks.stride, 1);
  require_at_most(kOp, "stride", params.chunks.stride, kLongestSequence);
  require_at_least(kOp, "start", params.start, -kLongestSequence);
  require_at_most(kOp, "start", params.start, kLongestSequence);
  if (params.copies == 1 || params.copies == 3) return;
  throw std::invalid_argument(std::string(kOp) + ": copies = " + std::to_string(params.copies) + "; expected 1 or 3");
}

void check(const AttentionRowTermsParams& params) {
  constexpr const char* kOp = "attention_row_terms";
  check_rows(kOp, params.batch, params.rows, params.heads, params.head_dim, params.dtype);
  check_heads(kOp, "grad", params.grad);
  check_heads(kOp, "output", params.output);
  require_aligned(kOp, "lse", params.lse, 4);
  require_aligned(kOp, "exponents", params.exponents, 4);
  require_aligned(kOp, "deltas", params.deltas, 4);
}

void check(const AttentionKeysBackwardParams& params) {
  constexpr const char* kOp = "attention_keys_backward";
  check_inputs(kOp, params.inputs);
  if (params.turns_back) require_pointer(kOp, "cos", params.inputs.problem.tables.cos);
  require_aligned(kOp, "dk", params.dk, kVectorBytes);
  require_aligned(kOp, "dv", params.dv, kVectorBytes);
}

void check(const AttentionQueriesBackwardParams& params) {
  constexpr const char* kOp = "attention_queries_backward";
  check_inputs(kOp, params.inputs);
  require_aligned(kOp, "dq", params.dq, kVectorBytes);
}

}  // namespace megatron_qwen
