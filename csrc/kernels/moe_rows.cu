#include <algorithm>

#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"
#include "megatron_qwen/moe_rows.h"
#include "vector.cuh"

namespace megatron_qwen {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// 2048 resident threads per multiprocessor.
constexpr int kBlocksPerMultiprocessor = 8;
// Of a 16-bit dtype in 16 bytes.
constexpr int kColumns = 8;

// A thread per row.
__global__ __launch_bounds__(kThreads) void moe_row_map_kernel(const MoeRowMapParams params) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  std::int64_t row = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; row < params.routed + params.shared_tokens; row += step) {
    float weight[1] = {1.0f};
    std::int64_t token = row;
    if (row >= params.routed) {
      token = row - params.routed;
      if (params.gates != nullptr) unpack(load<1>(params.gates + token), weight);
    } else {
      const std::int64_t slot = params.source != nullptr ? __ldg(params.source + row) : row;
      if (params.source != nullptr) token = slot / params.topk;
      unpack(load<1>(params.weights + slot), weight);
    }
    plain_store(params.tokens + row, static_cast<std::int32_t>(token));
    plain_store(params.row_weights + row, weight[0]);
  }
}

// A thread per 8 columns of a token. Rows are summed in the order of the token's experts.
template <typename T>
__global__ __launch_bounds__(kThreads) void moe_combine_kernel(const MoeCombineParams params) {
  const std::int64_t vectors = params.size / kColumns;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  const T* rows = static_cast<const T*>(params.rows);
  std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; at < params.tokens * vectors; at += step) {
    const std::int64_t token = at / vectors;
    const std::int64_t column = (at - token * vectors) * kColumns;
    float total[kColumns] = {}, values[kColumns];
#pragma unroll 4
    for (std::int64_t slot = 0; slot < params.topk; ++slot) {
      const std::int64_t position = __ldg(params.positions + token * params.topk + slot);
      unpack(load_once<kColumns>(rows + position * params.size + column), values);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += values[i];
    }
    if (params.shared != nullptr) {
      unpack(load_once<kColumns>(static_cast<const T*>(params.shared) + token * params.size + column), values);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += values[i];
    }
    if (params.scale != nullptr) {
      const float scale = __ldg(params.scale + token);
      unpack(load<kColumns>(static_cast<const T*>(params.vector) + column), values);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += scale * values[i];
    }
    store(static_cast<T*>(params.out) + token * params.size + column, pack<T>(total));
  }
}

// A warp per token.
template <typename T>
__global__ __launch_bounds__(kThreads) void moe_gate_kernel(const MoeGateParams params) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::int64_t token = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  for (; token < params.tokens; token += std::int64_t{gridDim.x} * kWarps) {
    const T* x = static_cast<const T*>(params.x) + token * params.size;
    float sum = 0.0f;
    for (std::int64_t column = lane * kColumns; column < params.size; column += 32 * kColumns) {
      float values[kColumns], factors[kColumns];
      unpack(load<kColumns>(x + column), values);
      unpack(load<kColumns>(static_cast<const T*>(params.vector) + column), factors);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum += values[i] * factors[i];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) plain_store(params.out + token, __fdividef(1.0f, 1.0f + __expf(-sum)));
  }
}

// A thread per 8 columns and program.
template <typename T>
__global__ __launch_bounds__(kThreads) void moe_gate_gradient_kernel(const MoeGateGradientParams params) {
  const std::int64_t vectors = params.size / kColumns;
  const std::int64_t share = (params.tokens + params.programs - 1) / params.programs;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; at < params.programs * vectors; at += step) {
    const std::int64_t program = at / vectors;
    const std::int64_t column = (at - program * vectors) * kColumns;
    const std::int64_t first = program * share;
    const std::int64_t end = first + share < params.tokens ? first + share : params.tokens;
    float total[kColumns] = {};
#pragma unroll 4
    for (std::int64_t token = first; token < end; ++token) {
      float values[kColumns];
      const float scale = __ldg(params.scale + token);
      unpack(load<kColumns>(static_cast<const T*>(params.x) + token * params.size + column), values);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += scale * values[i];
    }
    store(params.partial + program * params.size + column, pack<float>(total));
  }
}

std::int64_t blocks_for(const char* op, std::int64_t threads) {
  return std::min(ceil_divide(threads, kThreads), std::int64_t{num_multiprocessors(op)} * kBlocksPerMultiprocessor);
}

}  // namespace

void moe_row_map(const MoeRowMapParams& params) {
  constexpr const char* kOp = "moe_row_map";
  check(params);
  launch(kOp, moe_row_map_kernel, blocks_for(kOp, params.routed + params.shared_tokens), kThreads, params.stream,
         params);
}

void moe_combine(const MoeCombineParams& params) {
  constexpr const char* kOp = "moe_combine";
  check(params);
  dispatch_16_bits(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kOp, moe_combine_kernel<T>, blocks_for(kOp, params.tokens * (params.size / kColumns)), kThreads,
           params.stream, params);
  });
}

void moe_gate(const MoeGateParams& params) {
  constexpr const char* kOp = "moe_gate";
  check(params);
  dispatch_16_bits(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kOp, moe_gate_kernel<T>, blocks_for(kOp, params.tokens * 32), kThreads, params.stream, params);
  });
}

std::int64_t moe_gate_gradient_programs(std::int64_t tokens, std::int64_t size) {
  constexpr const char* kOp = "moe_gate_gradient_programs";
  const std::int64_t threads = std::int64_t{num_multiprocessors(kOp)} * kBlocksPerMultiprocessor * kThreads;
  return std::clamp(threads / (size / kColumns), std::int64_t{1}, tokens);
}

void moe_gate_gradient(const MoeGateGradientParams& params) {
  constexpr const char* kOp = "moe_gate_gradient";
  check(params);
  dispatch_16_bits(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kOp, moe_gate_gradient_kernel<T>, blocks_for(kOp, params.programs * (params.size / kColumns)), kThreads,
           params.stream, params);
  });
}

}  // namespace megatron_qwen
