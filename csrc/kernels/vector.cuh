// Neighbouring elements that one thread moves at once, and their conversion to and from fp32.
// All access to global memory goes through here: by CUDA's load and store functions, which csrc/tests/emulation
// replaces by ones that look at alignment and bounds (plain_store among them).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

// N elements of T, moved in accesses of 16 bytes, or in one access where all of them are fewer bytes.
template <typename T, int N>
struct Vector {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  static_assert(kBytes % 16 == 0 || kBytes == 8 || kBytes == 4 || kBytes == 2);
  using Access = std::conditional_t<
      kBytes >= 16, uint4,
      std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned int, unsigned short>>>;
  static constexpr int kAccesses = kBytes / static_cast<int>(sizeof(Access));

  Access access[kAccesses];
};

// Elements of T in 16 bytes.
template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// Of memory that no thread writes during the launch; it may be read again soon, so it stays in the caches.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* pointer) {
  Vector<T, N> result;
  const auto* source = reinterpret_cast<const typename Vector<T, N>::Access*>(pointer);
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kAccesses; ++i) result.access[i] = __ldg(source + i);
  return result;
}

// Of memory that nobody reads again: marked to be evicted first. The launch itself may write it afterwards.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_once(const T* pointer) {
  Vector<T, N> result;
  const auto* source = reinterpret_cast<const typename Vector<T, N>::Access*>(pointer);
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kAccesses; ++i) result.access[i] = __ldcs(source + i);
  return result;
}

#ifdef __CUDACC__
// The compiler's own store; __stwb would be a strong one (STG.STRONG.SM), and the others choose a cache.
template <typename T>
__device__ __forceinline__ void plain_store(T* pointer, T value) {
  *pointer = value;
}

// The same in one instruction, whatever the compiler thinks of its registers.
__device__ __forceinline__ void whole_store(uint4* pointer, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(pointer)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
#endif

template <typename T, int N>
__device__ __forceinline__ void store(T* pointer, const Vector<T, N>& vector) {
  auto* destination = reinterpret_cast<typename Vector<T, N>::Access*>(pointer);
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kAccesses; ++i) plain_store(destination + i, vector.access[i]);
}

// For kernels so short of neighbouring registers that the compiler would store a vector word by word.
template <typename T, int N>
__device__ __forceinline__ void store_whole(T* pointer, const Vector<T, N>& vector) {
  auto* destination = reinterpret_cast<uint4*>(pointer);
#pragma unroll
  for (int i = 0; i < Vector<T, N>::kAccesses; ++i) whole_store(destination + i, vector.access[i]);
}

__device__ __forceinline__ float2 to_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ float2 to_floats(__half2 pair) { return __half22float2(pair); }
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// Two elements of a 16-bit T, converted by one instruction.
template <typename T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ type from(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <>
struct PairOf<__half> {
  using type = __half2;
  static __device__ __forceinline__ type from(float low, float high) { return __floats2half2_rn(low, high); }
};

// The N elements of a vector in fp32. memcpy changes the type of registers; it moves nothing.
template <typename T, int N>
__device__ __forceinline__ void unpack(const Vector<T, N>& vector, float (&values)[N]) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(values, vector.access, sizeof(values));
  } else if constexpr (N == 1) {
    T element;
    std::memcpy(&element, vector.access, sizeof(element));
    values[0] = to_float(element);
  } else {
    typename PairOf<T>::type pairs[N / 2];
    std::memcpy(pairs, vector.access, sizeof(pairs));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 both = to_floats(pairs[i]);
      values[2 * i] = both.x;
      values[2 * i + 1] = both.y;
    }
  }
}

// N fp32 values rounded to T.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> pack(const float (&values)[N]) {
  Vector<T, N> result;
  if constexpr (sizeof(T) == 4) {
    std::memcpy(result.access, values, sizeof(values));
  } else if constexpr (N == 1) {
    const T element = from_float<T>(values[0]);
    std::memcpy(result.access, &element, sizeof(element));
  } else {
    typename PairOf<T>::type pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = PairOf<T>::from(values[2 * i], values[2 * i + 1]);
    std::memcpy(result.access, pairs, sizeof(pairs));
  }
  return result;
}

// N elements at `index` of an array whose dtype is known only at run time: for what is read once per thread, where a
// template per dtype would multiply the kernels and save nothing.
template <int N>
__device__ __forceinline__ void load_floats(const void* base, DType dtype, std::int64_t index, float (&values)[N]) {
  if (dtype == DType::kFloat32) {
    unpack(load<N>(static_cast<const float*>(base) + index), values);
  } else if (dtype == DType::kBFloat16) {
    unpack(load<N>(static_cast<const __nv_bfloat16*>(base) + index), values);
  } else {
    unpack(load<N>(static_cast<const __half*>(base) + index), values);
  }
}

}  // namespace megatron_qwen
