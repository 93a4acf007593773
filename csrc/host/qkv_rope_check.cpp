#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "megatron_qwen/check.h"
#include "megatron_qwen/qkv_rope.h"

namespace megatron_qwen {
namespace {

// Offsets within a row, and numbers of heads, are 32-bit in the kernels; those of rows are 64-bit.
constexpr std::int64_t kMaxRow = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kThreads = 256;

void require_strides(const char* op, const char* name, std::int64_t stride, std::int64_t steps) {
  require_at_least(op, name, stride, 0);
  // The last offset in bytes, of 4-byte elements, has to fit 64 bits with room for what else is added.
  require_at_most(op, name, stride, std::numeric_limits<std::int64_t>::max() / 16 / std::max<std::int64_t>(steps, 1));
}

void check_tables(const char* op, const RopeTables& tables, std::int64_t head_dim) {
  require_at_least(op, "head_dim", head_dim, 2);
  require_at_most(op, "head_dim", head_dim, kMaxRow);
  require_at_least(op, "half", tables.half, 1);
  require_at_most(op, "half", tables.half, head_dim / 2);
  require_at_least(op, "table_rows", tables.rows, 1);
  require_strides(op, "table_rows", tables.rows, tables.half);
  require_at_least(op, "tokens_per_position", tables.tokens_per_position, 1);
  require_aligned(op, "cos", tables.cos, 4);
  require_aligned(op, "sin", tables.sin, 4);
  if (tables.position_bytes == 0) return;
  if (tables.position_bytes != 4 && tables.position_bytes != 8) {
    throw std::invalid_argument(std::string(op) + ": position_bytes = " + std::to_string(tables.position_bytes) +
                                "; expected 4 (int32), 8 (int64) or 0 (no positions)");
  }
  require_aligned(op, "positions", tables.positions, tables.position_bytes);
}

void check_layout(const char* op, const QkvLayout& layout) {
  require_at_least(op, "groups", layout.groups, 1);
  require_at_least(op, "queries", layout.queries, 1);
  // Factor by factor, so that no product overflows before it is compared.
  require_at_most(op, "groups", layout.groups, kMaxRow);
  require_at_most(op, "queries", layout.queries, kMaxRow / layout.groups - 2);
  require_at_most(op, "head_dim", layout.head_dim, kMaxRow / (layout.groups * (layout.queries + 2)));
}

void check_tokens(const char* op, std::int64_t tokens) {
  require_at_least(op, "tokens", tokens, 0);
  require_at_most(op, "tokens", tokens, kMaxBlocks);
}

void check_heads(const char* op, const std::string& name, const StridedHeads& heads, DType dtype, std::int64_t tokens,
                 std::int64_t batch, std::int64_t num_heads) {
  require_aligned(op, name.c_str(), heads.data, size_of(dtype));
  require_strides(op, (name + " sequence stride").c_str(), heads.sequence_stride, ceil_divide(tokens, batch));
  require_strides(op, (name + " batch stride").c_str(), heads.batch_stride, batch);
  require_strides(op, (name + " head stride").c_str(), heads.head_stride, num_heads);
}

std::int64_t row_of(const QkvLayout& layout) { return layout.groups * (layout.queries + 2) * layout.head_dim; }

std::int64_t per_vector(DType dtype) { return kVectorBytes / size_of(dtype); }

bool all_multiples(std::int64_t of, std::initializer_list<std::int64_t> values) {
  return std::all_of(values.begin(), values.end(), [of](std::int64_t value) { return value % of == 0; });
}

bool all_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* pointer) { return is_multiple(pointer, kVectorBytes); });
}

bool heads_fit(const StridedHeads& heads, std::int64_t width) {
  return all_aligned({heads.data}) &&
         all_multiples(width, {heads.sequence_stride, heads.batch_stride, heads.head_stride});
}

}  // namespace

void check(const char* op, const QkvLayout& layout, std::int64_t half) {
  check_layout(op, layout);
  require_at_least(op, "half", half, 1);
  require_at_most(op, "half", half, layout.head_dim / 2);
}

void check(const QkvRopeForwardParams& params) {
  constexpr const char* kOp = "qkv_rope_forward";
  check_tokens(kOp, params.tokens);
  if (params.tokens == 0) return;
  check_tables(kOp, params.tables, params.layout.head_dim);
  check_layout(kOp, params.layout);
  require_strides(kOp, "packed_stride", params.packed_stride, params.tokens);
  const std::int64_t bytes = size_of(params.dtype);
  require_aligned(kOp, "packed", params.packed, bytes);
  require_aligned(kOp, "q", params.q, bytes);
  require_aligned(kOp, "k", params.k, bytes);
  require_aligned(kOp, "v", params.v, bytes);
  if (params.bias != nullptr) require_aligned(kOp, "bias", params.bias, size_of(params.bias_dtype));
}

void check(const QkvRopeBackwardParams& params) {
  constexpr const char* kOp = "qkv_rope_backward";
  check_tokens(kOp, params.tokens);
  if (params.tokens == 0) return;
  check_tables(kOp, params.tables, params.layout.head_dim);
  check_layout(kOp, params.layout);
  require_at_least(kOp, "batch", params.batch, 1);
  const std::int64_t heads = params.layout.groups * params.layout.queries;
  check_heads(kOp, "grad_q", params.grad_q, params.dtype, params.tokens, params.batch, heads);
  check_heads(kOp, "grad_k", params.grad_k, params.dtype, params.tokens, params.batch, params.layout.groups);
  check_heads(kOp, "grad_v", params.grad_v, params.dtype, params.tokens, params.batch, params.layout.groups);
  require_aligned(kOp, "grad_packed", params.grad_packed, size_of(params.dtype));
  require_at_least(kOp, "num_programs", params.num_programs, 1);
  require_at_most(kOp, "num_programs", params.num_programs, kMaxBlocks / ceil_divide(row_of(params.layout), kThreads));
  if (params.grad_bias == nullptr) return;
  require_aligned(kOp, "grad_bias", params.grad_bias, size_of(params.bias_dtype));
  require_aligned(kOp, "partial", params.partial, 4);
}

void check(const RopeParams& params) {
  constexpr const char* kOp = "rope";
  check_tokens(kOp, params.tokens);
  if (params.tokens == 0) return;
  check_tables(kOp, params.tables, params.head_dim);
  require_at_least(kOp, "q_heads", params.q_heads, 1);
  require_at_least(kOp, "k_heads", params.k_heads, 0);
  require_at_most(kOp, "q_heads", params.q_heads, kMaxRow / 2);
  require_at_most(kOp, "k_heads", params.k_heads, kMaxRow / 2);
  require_at_least(kOp, "batch", params.batch, 1);
  check_heads(kOp, "q", params.q, params.dtype, params.tokens, params.batch, params.q_heads);
  if (params.k_heads > 0) check_heads(kOp, "k", params.k, params.dtype, params.tokens, params.batch, params.k_heads);
}

bool moves_vectors(const QkvRopeForwardParams& params) {
  return all_multiples(per_vector(params.dtype), {params.layout.head_dim, params.tables.half, params.packed_stride}) &&
         all_aligned(
             {params.packed, params.bias, params.q, params.k, params.v, params.tables.cos, params.tables.sin}) &&
         (params.bias == nullptr || params.bias_dtype == params.dtype);
}

bool moves_vectors(const QkvRopeBackwardParams& params) {
  const std::int64_t width = per_vector(params.dtype);
  return all_multiples(width, {params.layout.head_dim, params.tables.half}) &&
         all_aligned({params.grad_packed, params.partial, params.tables.cos, params.tables.sin}) &&
         heads_fit(params.grad_q, width) && heads_fit(params.grad_k, width) && heads_fit(params.grad_v, width);
}

bool moves_vectors(const RopeParams& params) {
  const std::int64_t width = per_vector(params.dtype);
  return all_multiples(width, {params.tables.half}) && all_aligned({params.tables.cos, params.tables.sin}) &&
         heads_fit(params.q, width) && (params.k_heads == 0 || heads_fit(params.k, width));
}

}  // namespace megatron_qwen
