// What the kernels of qkv_rope.cu share: which columns a thread has, its angles, and the rotation.
#pragma once

#include <cmath>

#include "megatron_qwen/qkv_rope.h"
#include "vector.cuh"

namespace megatron_qwen {

// Columns of a head are dealt out in units of kWidth. One of the first half / kWidth units comes with its partner
// `half` columns further, so that rotating moves nothing between threads; a unit behind the rotated dimensions comes
// alone.
struct Units {
  int paired;
  int all;

  template <int kWidth>
  static Units of(std::int64_t half, std::int64_t head_dim) {
    const int paired = static_cast<int>(half) / kWidth;
    return {paired, paired + static_cast<int>(head_dim - 2 * half) / kWidth};
  }

  template <int kWidth>
  __device__ __forceinline__ int column(int unit) const {
    return (unit < paired ? unit : unit + paired) * kWidth;
  }
};

template <int kWidth>
struct Angles {
  float cos[kWidth];
  float sin[kWidth];
};

template <typename T>
__device__ __forceinline__ T load_value(const T* pointer) {
  const Vector<T, 1> vector = load<1>(pointer);
  T value;
  std::memcpy(&value, vector.access, sizeof(T));
  return value;
}

__device__ __forceinline__ std::int64_t position_of(const RopeTables& tables, std::int64_t token) {
  const std::int64_t index = tables.tokens_per_position == 1 ? token : token / tables.tokens_per_position;
  if (tables.position_bytes == 4) return load_value(static_cast<const std::int32_t*>(tables.positions) + index);
  if (tables.position_bytes == 8) return load_value(static_cast<const std::int64_t*>(tables.positions) + index);
  return index;
}

// NaN for a position outside of the tables.
template <int kWidth>
__device__ __forceinline__ Angles<kWidth> load_angles(const RopeTables& tables, std::int64_t position, int column) {
  Angles<kWidth> angles;
  if (position >= 0 && position < tables.rows) {
    unpack(load<kWidth>(tables.cos + position * tables.half + column), angles.cos);
    unpack(load<kWidth>(tables.sin + position * tables.half + column), angles.sin);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) angles.cos[i] = angles.sin[i] = NAN;
  }
  return angles;
}

template <int kWidth>
__device__ __forceinline__ void rotate(float (&first)[kWidth], float (&second)[kWidth], const Angles<kWidth>& angles) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float x1 = first[i];
    const float x2 = second[i];
    first[i] = x1 * angles.cos[i] - x2 * angles.sin[i];
    second[i] = x2 * angles.cos[i] + x1 * angles.sin[i];
  }
}

template <int kWidth>
__device__ __forceinline__ void rotate_back(float (&first)[kWidth], float (&second)[kWidth],
                                            const Angles<kWidth>& angles) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float y1 = first[i];
    const float y2 = second[i];
    first[i] = y1 * angles.cos[i] + y2 * angles.sin[i];
    second[i] = y2 * angles.cos[i] - y1 * angles.sin[i];
  }
}

// How the threads of a block share tokens: some head lanes of every unit on one token, several tokens in a block. A
// thread reads the angles of its token once and takes every head_lanes-th head.
struct TokenShare {
  int unit_lanes;
  int head_lanes;
  int tokens_per_block;

  __device__ __forceinline__ int threads_per_token() const { return unit_lanes * head_lanes; }
};

}  // namespace megatron_qwen
