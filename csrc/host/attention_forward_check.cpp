#include <sstream>
#include <stdexcept>
#include <string>

#include "megatron_qwen/attention.h"
#include "megatron_qwen/check.h"

namespace megatron_qwen {
namespace {

// Of a 16-bit dtype.
constexpr std::int64_t kVectorElements = kVectorBytes / 2;
// What TMA takes, in elements of 2 bytes.
constexpr std::int64_t kMostStride = std::int64_t{1} << 39;
// Tiles times heads are dealt out by numbers of 32 bits.
constexpr std::int64_t kMostSlots = std::int64_t{1} << 30;

[[noreturn]] void reject(const char* op, const char* name, std::int64_t value, const std::string& expected) {
  std::ostringstream message;
  message << op << ": " << name << " = " << value << "; expected " << expected;
  throw std::invalid_argument(message.str());
}

void require_between(const char* op, const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  require_at_least(op, name, value, least);
  require_at_most(op, name, value, most);
}

void check_sizes(const char* op, const AttentionSizes& sizes) {
  require_between(op, "batch", sizes.batch, 1, kMaxBlocks);
  require_between(op, "rows_q", sizes.rows_q, 1, kLongestSequence);
  require_between(op, "rows_k", sizes.rows_k, 0, kLongestSequence);
  require_between(op, "heads_q", sizes.heads_q, 1, 65536);
  require_at_least(op, "heads_k", sizes.heads_k, 1);
  if (sizes.heads_q % sizes.heads_k != 0) {
    reject(op, "heads_k", sizes.heads_k, "a divisor of heads_q = " + std::to_string(sizes.heads_q));
  }
  if (sizes.head_dim != 64 && sizes.head_dim != 128) reject(op, "head_dim", sizes.head_dim, "64 or 128");
}

void check_chunks(const char* op, const AttentionChunks& chunks) {
  require_between(op, "stride", chunks.stride, 1, kLongestSequence);
  require_between(op, "cap", chunks.cap, 0, kLongestSequence);
  require_between(op, "inter", chunks.inter, 0, kLongestSequence);
  require_between(op, "alike_from", chunks.alike_from, 0, kLongestSequence);
}

void check_positions(const char* op, const AttentionSequences& sequences) {
  require_between(op, "query_start", sequences.query_start, -kLongestSequence, kLongestSequence);
  require_between(op, "key_start", sequences.key_start, 0, kLongestSequence);
  if (sequences.cu_q == nullptr && sequences.cu_k == nullptr) return;
  if (sequences.bytes != 4 && sequences.bytes != 8) reject(op, "bytes of a boundary", sequences.bytes, "4 or 8");
  require_aligned(op, "cu_q", sequences.cu_q, sequences.bytes);
  require_aligned(op, "cu_k", sequences.cu_k, sequences.bytes);
}

}  // namespace

void check_problem(const char* op, const AttentionProblem& problem) {
  if (problem.dtype == DType::kFloat32) {
    throw std::invalid_argument(std::string(op) + ": dtype is float32; expected bfloat16 or float16");
  }
  check_sizes(op, problem.sizes);
  check_chunks(op, problem.chunks);
  check_positions(op, problem.sequences);
  require_between(op, "slots", problem.tiles.slots, 1, kMostSlots);
  require_between(op, "per_chunk", problem.tiles.per_chunk, 1, kLongestSequence);
  require_between(op, "first tile", problem.tiles.first, -kLongestSequence, kLongestSequence);
  if (problem.sequences.cu_q != nullptr) require_aligned(op, "list of tiles", problem.tiles.list, 4);
  if (problem.tables.cos != nullptr || problem.tables.sin != nullptr) {
    require_aligned(op, "cos", problem.tables.cos, kVectorBytes);
    require_aligned(op, "sin", problem.tables.sin, kVectorBytes);
    require_at_least(op, "rows of tables", problem.tables.rows, 1);
  }
  if (problem.logit_scale != nullptr) require_aligned(op, "logit_scale", problem.logit_scale, 4);
  if (problem.scale > 0.0f) return;
  throw std::invalid_argument(std::string(op) + ": scale = " + std::to_string(problem.scale) +
                              "; expected a positive number");
}

void check_heads(const char* op, const char* name, const AttentionHeads& heads) {
  require_aligned(op, name, heads.data, kVectorBytes);
  for (const std::int64_t stride : {heads.batch_stride, heads.row_stride, heads.head_stride}) {
    require_between(op, (std::string("stride of ") + name).c_str(), stride, 0, kMostStride - 1);
    if (stride % kVectorElements == 0) continue;
    reject(op, (std::string("stride of ") + name).c_str(), stride,
           "a multiple of " + std::to_string(kVectorElements) + " elements");
  }
}

void check(const AttentionForwardParams& params) {
  constexpr const char* kOp = "attention_forward";
  check_problem(kOp, params.problem);
  check_heads(kOp, "q", params.q);
  if (params.problem.sizes.rows_k != 0) {
    check_heads(kOp, "k", params.k);
    check_heads(kOp, "v", params.v);
  }
  require_aligned(kOp, "out", params.out, kVectorBytes);
  require_aligned(kOp, "lse", params.lse, 4);
}

}  // namespace megatron_qwen
