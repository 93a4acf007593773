// Shared memory, barriers, and the registers of a warpgroup, for Hopper (sm_90a): one PTX instruction per function.
// csrc/tests/emulation has a header of the same name and functions that runs on a CPU.
// Source: PTX ISA 9.0, "mbarrier", "bar", "setmaxnreg".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// The library is compiled for sm_80, too, where these instructions do not exist: kernels are empty there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MEGATRON_QWEN_SM90 1
#else
#define MEGATRON_QWEN_SM90 0
#endif

namespace megatron_qwen::sm90 {

// In shared memory. A phase ends once all its arrivals came and all bytes it expects were written.
using Barrier = std::uint64_t;

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void initialize(Barrier* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copies of other threads and of TMA.
__device__ __forceinline__ void fence_initialized_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity; the first has parity 0, and the one before it counts as ended.
__device__ __forceinline__ void wait(Barrier* barrier, std::uint32_t parity) {
  std::uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Barriers 1 to 15 of a block, beside that of __syncthreads: threads of whole warps wait until kThreads came, or come
// and go on.
template <int kThreads>
__device__ __forceinline__ void sync_threads(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void arrive_threads(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Writes 16 bytes of shared memory, at a multiple of 16.
__device__ __forceinline__ void store_16_bytes(std::uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// 2^x, at most 2 units in the last place off; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Called by all threads of a warpgroup: from here on each has kCount registers.
template <int kCount>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace megatron_qwen::sm90
