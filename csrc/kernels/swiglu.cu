#include <algorithm>
#include <initializer_list>

#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"
#include "megatron_qwen/swiglu.h"
#include "vector.cuh"

namespace megatron_qwen {
namespace {

constexpr int kThreads = 256;
// 2048 resident threads, each with two or three 16-byte loads on the way: 64 KiB or more per multiprocessor, where the
// latency of HBM asks for 18 KiB (copy_bandwidth.cu). More blocks only add to the start and the end of a launch.
constexpr int kBlocksPerMultiprocessor = 8;

// One thread's way through [rows, vectors of a row]: the threads of the grid take neighbouring vectors, then all move
// on together. Row and vector are carried along, so that 64-bit divisions happen once per thread and lanes are never
// idle, whatever the width.
class Walk {
 public:
  __device__ Walk(std::int64_t rows, std::int64_t vectors) : rows_(rows), vectors_(vectors) {
    const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
    row_ = first / vectors;
    vector_ = first - row_ * vectors;
    row_step_ = step / vectors;
    vector_step_ = step - row_step_ * vectors;
  }

  __device__ bool inside() const { return row_ < rows_; }
  __device__ std::int64_t row() const { return row_; }
  __device__ std::int64_t vector() const { return vector_; }

  __device__ void advance() {
    row_ += row_step_;
    vector_ += vector_step_;
    if (vector_ >= vectors_) {
      vector_ -= vectors_;
      ++row_;
    }
  }

 private:
  std::int64_t rows_, vectors_, row_, vector_, row_step_, vector_step_;
};

// By the approximations of exp and division. Below -87 it is exactly 0: exp overflows, or the divisor is beyond 2^126,
// for which __fdividef gives 0; the sigmoid itself is less than the smallest normal number there.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// out is read next, by the down projection, so it may stay in the L2 cache; packed waits for the backward pass.
template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads) void swiglu_forward_kernel(const SwiGLUForwardParams params) {
  const T* packed = static_cast<const T*>(params.packed);
  T* out = static_cast<T*>(params.out);
  for (Walk at(params.rows, params.width / kWidth); at.inside(); at.advance()) {
    const std::int64_t column = at.vector() * kWidth;
    const T* gate_pointer = packed + at.row() * params.packed_stride + column;
    const auto gate_vector = load_once<kWidth>(gate_pointer);
    const auto up_vector = load_once<kWidth>(gate_pointer + params.width);
    float gate[kWidth], up[kWidth], result[kWidth];
    unpack(gate_vector, gate);
    unpack(up_vector, up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result[i] = gate[i] * sigmoid(gate[i]) * up[i];
    store(out + at.row() * params.width + column, pack<T>(result));
  }
}

// With s = sigmoid(gate): d gate = grad up s (1 + gate (1 - s)), d up = grad gate s. The activation is computed anew.
template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads) void swiglu_backward_kernel(const SwiGLUBackwardParams params) {
  const T* grad = static_cast<const T*>(params.grad);
  const T* packed = static_cast<const T*>(params.packed);
  T* grad_packed = static_cast<T*>(params.grad_packed);
  for (Walk at(params.rows, params.width / kWidth); at.inside(); at.advance()) {
    const std::int64_t column = at.vector() * kWidth;
    const T* gate_pointer = packed + at.row() * params.packed_stride + column;
    const auto grad_vector = load_once<kWidth>(grad + at.row() * params.grad_stride + column);
    const auto gate_vector = load_once<kWidth>(gate_pointer);
    const auto up_vector = load_once<kWidth>(gate_pointer + params.width);
    float grad_out[kWidth], gate[kWidth], up[kWidth], grad_gate[kWidth], grad_up[kWidth];
    unpack(grad_vector, grad_out);
    unpack(gate_vector, gate);
    unpack(up_vector, up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float s = sigmoid(gate[i]);
      grad_gate[i] = grad_out[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
      grad_up[i] = grad_out[i] * gate[i] * s;
    }
    T* grad_gate_pointer = grad_packed + at.row() * (2 * params.width) + column;
    store(grad_gate_pointer, pack<T>(grad_gate));
    store(grad_gate_pointer + params.width, pack<T>(grad_up));
  }
}

std::int64_t blocks_for(const char* op, std::int64_t vectors) {
  return std::min(ceil_divide(vectors, kThreads), std::int64_t{num_multiprocessors(op)} * kBlocksPerMultiprocessor);
}

// Every row of every operand starts at a multiple of 16 bytes, and so does the half of a packed row.
template <typename T>
bool rows_are_aligned(std::int64_t width, std::initializer_list<std::int64_t> strides,
                      std::initializer_list<const void*> pointers) {
  return width % kPerVector<T> == 0 &&
         std::all_of(strides.begin(), strides.end(), [](std::int64_t stride) { return stride % kPerVector<T> == 0; }) &&
         std::all_of(pointers.begin(), pointers.end(), [](const void* at) { return is_multiple(at, kVectorBytes); });
}

}  // namespace

void swiglu_forward(const SwiGLUForwardParams& params) {
  constexpr const char* kOp = "swiglu_forward";
  check(params);
  if (params.rows == 0 || params.width == 0) return;
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto start = [&](auto kernel, int width) {
      launch(kOp, kernel, blocks_for(kOp, params.rows * (params.width / width)), kThreads, params.stream, params);
    };
    if (rows_are_aligned<T>(params.width, {params.packed_stride}, {params.packed, params.out})) {
      return start(swiglu_forward_kernel<T, kPerVector<T>>, kPerVector<T>);
    }
    start(swiglu_forward_kernel<T, 1>, 1);
  });
}

void swiglu_backward(const SwiGLUBackwardParams& params) {
  constexpr const char* kOp = "swiglu_backward";
  check(params);
  if (params.rows == 0 || params.width == 0) return;
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto start = [&](auto kernel, int width) {
      launch(kOp, kernel, blocks_for(kOp, params.rows * (params.width / width)), kThreads, params.stream, params);
    };
    if (rows_are_aligned<T>(params.width, {params.grad_stride, params.packed_stride},
                            {params.grad, params.packed, params.grad_packed})) {
      return start(swiglu_backward_kernel<T, kPerVector<T>>, kPerVector<T>);
    }
    start(swiglu_backward_kernel<T, 1>, 1);
  });
}

}  // namespace megatron_qwen
