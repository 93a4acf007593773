// Stands in for CUDA's header where kernels are compiled by a C++ compiler (emulation.h): only what our kernels use.
// Atomics are missing on purpose: no kernel of ours may use them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// Blocks run one after the other, so one copy serves them all. It holds what the block before left there.
#define __shared__ static

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 : emulation::Index {
  dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : emulation::Index{x, y, z} {}
};

enum cudaError_t { cudaSuccess };
enum cudaMemoryType { cudaMemoryTypeDevice, cudaMemoryTypeManaged };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
using cudaStream_t = void*;
struct cudaPointerAttributes {
  cudaMemoryType type;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... parameters) {
  emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(parameters...); });
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t) {
  *blocks = 2;
  return cudaSuccess;
}

template <typename T>
T checked_load(const T* pointer) {
  emulation::check_access("a read", pointer, sizeof(T));
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}

template <typename T>
void checked_store(T* pointer, T value) {
  emulation::check_access("a write", pointer, sizeof(T));
  std::memcpy(pointer, &value, sizeof(T));
}

#define __ldg checked_load
#define __ldcs checked_load
#define __ldcg checked_load
#define plain_store checked_store
#define whole_store checked_store
#define __stcs checked_store
#define __stcg checked_store

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

template <typename T>
T __shfl_sync(unsigned int, T value, unsigned int source) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Every thread of the warp takes part, as the full mask of our kernels says.
template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, emulation::lane() ^ static_cast<unsigned int>(lane_mask));
}

template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int distance) {
  const unsigned int source = emulation::lane() + distance;
  return __shfl_sync(mask, value, source < emulation::kWarpSize ? source : emulation::lane());
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
using std::fmaf;
using std::max;
using std::min;
