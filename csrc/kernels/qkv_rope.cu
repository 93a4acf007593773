#include <algorithm>

#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"
#include "megatron_qwen/column_sum.h"
#include "megatron_qwen/qkv_rope.h"
#include "qkv_rope.cuh"

namespace megatron_qwen {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Heads whose loads are in flight together in one thread: 7B has 9 heads per lane, 72B 20.
constexpr int kHeads = 3;
// Tokens whose gradients are in flight together in one thread.
constexpr int kTokens = 2;

// A head counted through a row of groups, by steps of head lanes without a division.
struct HeadCursor {
  int head;
  int group;
  int slot;

  __device__ __forceinline__ void advance(int heads, int groups, int slots, int per_group) {
    head += heads;
    group += groups;
    slot += slots;
    if (slot >= per_group) {
      slot -= per_group;
      ++group;
    }
  }
};

// Vectors add a bias of their own dtype, where kVectorBias says that there is one; single elements add one of any
// dtype.
template <typename T, int kWidth, bool kVectorBias>
__device__ __forceinline__ void add_bias(const QkvRopeForwardParams& params, int offset, int partner, bool paired,
                                         float (&x1)[kWidth], float (&x2)[kWidth]) {
  if (!kVectorBias && (kWidth > 1 || params.bias == nullptr)) return;
  const DType dtype = kVectorBias ? dtype_of<T> : params.bias_dtype;
  float bias[kWidth];
  load_floats<kWidth>(params.bias, dtype, offset, bias);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x1[i] += bias[i];
  if (!paired) return;
  load_floats<kWidth>(params.bias, dtype, offset + partner, bias);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x2[i] += bias[i];
}

// Writes q, k and v of some tokens.
template <typename T, int kWidth, bool kVectorBias>
__global__ __launch_bounds__(kThreads) void qkv_rope_forward_kernel(const QkvRopeForwardParams params,
                                                                    const Units units, const TokenShare share) {
  const int token_lane = static_cast<int>(threadIdx.x) / share.threads_per_token();
  const int lane = static_cast<int>(threadIdx.x) % share.threads_per_token();
  const std::int64_t token = std::int64_t{blockIdx.x} * share.tokens_per_block + token_lane;
  if (token_lane >= share.tokens_per_block || token >= params.tokens) return;

  const int queries = static_cast<int>(params.layout.queries);
  const int groups = static_cast<int>(params.layout.groups);
  const int head_dim = static_cast<int>(params.layout.head_dim);
  const int half = static_cast<int>(params.tables.half);
  const int per_group = queries + 2;
  const int heads = groups * per_group;
  const int group_step = share.head_lanes / per_group;
  const int slot_step = share.head_lanes % per_group;
  const std::int64_t position = position_of(params.tables, token);

  for (int unit = lane % share.unit_lanes; unit < units.all; unit += share.unit_lanes) {
    const int column = units.column<kWidth>(unit);
    const bool paired = unit < units.paired;
    Angles<kWidth> angles{};
    if (paired) angles = load_angles<kWidth>(params.tables, position, column);
    const T* row = static_cast<const T*>(params.packed) + token * params.packed_stride + column;
    T* q = static_cast<T*>(params.q) + token * (groups * queries * head_dim) + column;
    T* k = static_cast<T*>(params.k) + token * (groups * head_dim) + column;
    T* v = static_cast<T*>(params.v) + token * (groups * head_dim) + column;

    const int head_lane = lane / share.unit_lanes;
    HeadCursor cursor{head_lane, head_lane / per_group, head_lane % per_group};
    while (cursor.head < heads) {
      Vector<T, kWidth> first[kHeads];
      Vector<T, kWidth> second[kHeads];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const int head = cursor.head + i * share.head_lanes;
        if (head < heads) first[i] = load_once<kWidth>(row + head * head_dim);
        if (head < heads && paired) second[i] = load_once<kWidth>(row + head * head_dim + half);
      }
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        if (cursor.head < heads) {
          float x1[kWidth];
          float x2[kWidth] = {};
          unpack(first[i], x1);
          if (paired) unpack(second[i], x2);
          add_bias<T, kWidth, kVectorBias>(params, cursor.head * head_dim + column, half, paired, x1, x2);
          if (paired && cursor.slot <= queries) rotate(x1, x2, angles);
          T* out = cursor.slot < queries ? q + (cursor.group * queries + cursor.slot) * head_dim
                                         : (cursor.slot == queries ? k : v) + cursor.group * head_dim;
          store(out, pack<T>(x1));
          if (paired) store(out + half, pack<T>(x2));
        }
        cursor.advance(share.head_lanes, group_step, slot_step, per_group);
      }
    }
  }
}

// A program is a range of tokens; its blocks share the heads. A thread has one unit of one head over the whole range,
// so that the bias's gradient stays in its registers.
template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads) void qkv_rope_backward_kernel(const QkvRopeBackwardParams params,
                                                                     const Units units, const int blocks_per_program) {
  const int queries = static_cast<int>(params.layout.queries);
  const int head_dim = static_cast<int>(params.layout.head_dim);
  const int half = static_cast<int>(params.tables.half);
  const int per_group = queries + 2;
  const int heads = static_cast<int>(params.layout.groups) * per_group;
  const std::int64_t width = std::int64_t{heads} * head_dim;
  const std::int64_t program = blockIdx.x / blocks_per_program;
  const int item = static_cast<int>(blockIdx.x % blocks_per_program * blockDim.x + threadIdx.x);
  const int head = item / units.all;
  const int unit = item % units.all;
  if (head >= heads) return;

  const int group = head / per_group;
  const int slot = head % per_group;
  const int column = units.column<kWidth>(unit);
  const bool paired = unit < units.paired;
  const bool rotates = paired && slot <= queries;
  const StridedHeads& grad = slot < queries ? params.grad_q : slot == queries ? params.grad_k : params.grad_v;
  const std::int64_t head_of_grad = slot < queries ? group * queries + slot : group;
  const T* source = static_cast<const T*>(grad.data) + head_of_grad * grad.head_stride + column;
  const std::int64_t sequence_stride = grad.sequence_stride;
  const std::int64_t batch_stride = grad.batch_stride;
  const int offset = head * head_dim + column;

  const std::int64_t tokens_per_program = (params.tokens + params.num_programs - 1) / params.num_programs;
  const std::int64_t end = min(params.tokens, (program + 1) * tokens_per_program);
  std::int64_t token = program * tokens_per_program;
  std::int64_t sequence = token / params.batch;
  std::int64_t batch = token % params.batch;
  float sum1[kWidth] = {};
  float sum2[kWidth] = {};
  for (; token < end; token += kTokens) {
    Vector<T, kWidth> first[kTokens];
    Vector<T, kWidth> second[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const T* here = source + sequence * sequence_stride + batch * batch_stride;
      if (token + i < end) first[i] = load_once<kWidth>(here);
      if (token + i < end && paired) second[i] = load_once<kWidth>(here + half);
      if (++batch == params.batch) {
        batch = 0;
        ++sequence;
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (token + i >= end) break;
      float g1[kWidth];
      float g2[kWidth] = {};
      unpack(first[i], g1);
      if (paired) unpack(second[i], g2);
      if (rotates) {
        rotate_back(g1, g2, load_angles<kWidth>(params.tables, position_of(params.tables, token + i), column));
      }
      T* out = static_cast<T*>(params.grad_packed) + (token + i) * width + offset;
      store(out, pack<T>(g1));
      if (paired) store(out + half, pack<T>(g2));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sum1[j] += g1[j];
        sum2[j] += g2[j];
      }
    }
  }
  if (params.partial == nullptr) return;
  float* partial = params.partial + program * width + offset;
  store(partial, pack<float>(sum1));
  if (paired) store(partial + half, pack<float>(sum2));
}

// Rotates q's and k's heads in place; a thread reads both its vectors before it writes either.
template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads) void rope_kernel(const RopeParams params, const Units units,
                                                        const TokenShare share) {
  const int token_lane = static_cast<int>(threadIdx.x) / share.threads_per_token();
  const int lane = static_cast<int>(threadIdx.x) % share.threads_per_token();
  const std::int64_t token = std::int64_t{blockIdx.x} * share.tokens_per_block + token_lane;
  if (token_lane >= share.tokens_per_block || token >= params.tokens) return;

  const int half = static_cast<int>(params.tables.half);
  const int q_heads = static_cast<int>(params.q_heads);
  const int heads = q_heads + static_cast<int>(params.k_heads);
  const std::int64_t position = position_of(params.tables, token);
  const std::int64_t sequence = token / params.batch;
  const std::int64_t batch = token % params.batch;
  const std::int64_t q_token = sequence * params.q.sequence_stride + batch * params.q.batch_stride;
  const std::int64_t k_token = sequence * params.k.sequence_stride + batch * params.k.batch_stride;

  for (int unit = lane % share.unit_lanes; unit < units.paired; unit += share.unit_lanes) {
    const int column = unit * kWidth;
    const Angles<kWidth> angles = load_angles<kWidth>(params.tables, position, column);
    T* q = static_cast<T*>(params.q.data) + q_token + column;
    T* k = static_cast<T*>(params.k.data) + k_token + column;
    for (int head = lane / share.unit_lanes; head < heads; head += kHeads * share.head_lanes) {
      T* where[kHeads];
      Vector<T, kWidth> first[kHeads];
      Vector<T, kWidth> second[kHeads];
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const int here = head + i * share.head_lanes;
        where[i] = here < q_heads ? q + here * params.q.head_stride : k + (here - q_heads) * params.k.head_stride;
        if (here >= heads) continue;
        first[i] = load_once<kWidth>(where[i]);
        second[i] = load_once<kWidth>(where[i] + half);
      }
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        if (head + i * share.head_lanes >= heads) break;
        float x1[kWidth];
        float x2[kWidth];
        unpack(first[i], x1);
        unpack(second[i], x2);
        if (params.inverse) {
          rotate_back(x1, x2, angles);
        } else {
          rotate(x1, x2, angles);
        }
        store(where[i], pack<T>(x1));
        store(where[i] + half, pack<T>(x2));
      }
    }
  }
}

// A warp per token, or, where that would leave most of the device idle, a block.
TokenShare share_tokens(const char* op, int units, std::int64_t heads, std::int64_t tokens) {
  TokenShare share{};
  share.unit_lanes = std::min(units, kThreads);
  const bool few = tokens * kWarp < std::int64_t{num_multiprocessors(op)} * kThreads;
  const int lanes = (few ? kThreads : kWarp) / share.unit_lanes;
  share.head_lanes = static_cast<int>(std::min<std::int64_t>(heads, std::max(1, lanes)));
  share.tokens_per_block = kThreads / (share.unit_lanes * share.head_lanes);
  return share;
}

template <typename T, int kWidth>
void forward(const QkvRopeForwardParams& params) {
  constexpr const char* kOp = "qkv_rope_forward";
  const Units units = Units::of<kWidth>(params.tables.half, params.layout.head_dim);
  const std::int64_t heads = params.layout.groups * (params.layout.queries + 2);
  const TokenShare share = share_tokens(kOp, units.all, heads, params.tokens);
  // With kWidth 1 both are the same kernel.
  const auto kernel = params.bias == nullptr ? qkv_rope_forward_kernel<T, kWidth, false>
                                             : qkv_rope_forward_kernel<T, kWidth, (kWidth > 1)>;
  launch(kOp, kernel, ceil_divide(params.tokens, share.tokens_per_block), kThreads, params.stream, params, units,
         share);
}

struct BackwardBlocks {
  std::int64_t per_program;
  int threads;
};

// As even as warps allow: 288 threads' work is 2 blocks of 160, not one of 256 and one of 32.
BackwardBlocks backward_blocks(const QkvLayout& layout, const Units& units) {
  const std::int64_t items = layout.groups * (layout.queries + 2) * units.all;
  const std::int64_t per_program = ceil_divide(items, kThreads);
  return {per_program, static_cast<int>(ceil_divide(ceil_divide(items, per_program), kWarp) * kWarp)};
}

template <typename T, int kWidth>
void backward(const QkvRopeBackwardParams& params) {
  const Units units = Units::of<kWidth>(params.tables.half, params.layout.head_dim);
  const BackwardBlocks blocks = backward_blocks(params.layout, units);
  launch("qkv_rope_backward", qkv_rope_backward_kernel<T, kWidth>, params.num_programs * blocks.per_program,
         blocks.threads, params.stream, params, units, static_cast<int>(blocks.per_program));
}

template <typename T, int kWidth>
std::int64_t resident_programs(const char* op, const QkvLayout& layout, std::int64_t half) {
  const BackwardBlocks blocks = backward_blocks(layout, Units::of<kWidth>(half, layout.head_dim));
  return resident_blocks(op, qkv_rope_backward_kernel<T, kWidth>, blocks.threads) / blocks.per_program;
}

template <typename T, int kWidth>
void rotate_in_place(const RopeParams& params) {
  constexpr const char* kOp = "rope";
  const Units units = Units::of<kWidth>(params.tables.half, params.head_dim);
  const TokenShare share = share_tokens(kOp, units.paired, params.q_heads + params.k_heads, params.tokens);
  launch(kOp, rope_kernel<T, kWidth>, ceil_divide(params.tokens, share.tokens_per_block), kThreads, params.stream,
         params, units, share);
}

}  // namespace

void qkv_rope_forward(const QkvRopeForwardParams& params) {
  check(params);
  if (params.tokens == 0) return;
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    moves_vectors(params) ? forward<T, kPerVector<T>>(params) : forward<T, 1>(params);
  });
}

void qkv_rope_backward(const QkvRopeBackwardParams& params) {
  check(params);
  if (params.tokens == 0) return;
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    moves_vectors(params) ? backward<T, kPerVector<T>>(params) : backward<T, 1>(params);
  });
  if (params.grad_bias == nullptr) return;
  const std::int64_t columns = params.layout.groups * (params.layout.queries + 2) * params.layout.head_dim;
  column_sum({params.partial, params.grad_bias, params.num_programs, columns, params.bias_dtype, params.stream});
}

void rope(const RopeParams& params) {
  check(params);
  if (params.tokens == 0) return;
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    moves_vectors(params) ? rotate_in_place<T, kPerVector<T>>(params) : rotate_in_place<T, 1>(params);
  });
}

std::int64_t qkv_rope_backward_programs(const QkvLayout& layout, std::int64_t half, std::int64_t tokens, DType dtype) {
  constexpr const char* kOp = "qkv_rope_backward_programs";
  check(kOp, layout, half);
  require_at_least(kOp, "tokens", tokens, 1);
  std::int64_t resident = 0;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // Addresses and strides are not known here; where they ask for single elements, more blocks start than fit at once.
    const bool wide = half % kPerVector<T> == 0 && layout.head_dim % kPerVector<T> == 0;
    resident =
        wide ? resident_programs<T, kPerVector<T>>(kOp, layout, half) : resident_programs<T, 1>(kOp, layout, half);
  });
  // As even as tokens allow: none is without one.
  return ceil_divide(tokens, ceil_divide(tokens, std::max<std::int64_t>(1, resident)));
}

}  // namespace megatron_qwen
