// Multiplication of tiles in shared memory by the four warps of a warpgroup (wgmma); see mbarrier.cuh.
// Source: PTX ISA 9.0, "wgmma.mma_async"; the descriptors are made in csrc/kernels/operand_tile.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "megatron_qwen/sm90/mbarrier.cuh"

namespace megatron_qwen::sm90 {

// fp32 numbers per thread of a product [64, 256]; a product of N columns has N / 2, and all functions here take 32, 64
// or 128 of them. Number 4 j + 2 h + i of a thread is in row 16 warp + 8 h + lane / 4 and column 8 j + 2 (lane % 4) +
// i.
constexpr int kAccumulators = 128;

// Around what touches accumulators or shared memory: before the first multiplication, and its end.
__device__ __forceinline__ void begin_multiplications() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_multiplications() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_multiplications() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators, or operands in registers, across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(std::uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Accumulators as PTX numbers them, and as operands.
#define MEGATRON_QWEN_NUMBERS_32                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MEGATRON_QWEN_NUMBERS_64                                                     \
  MEGATRON_QWEN_NUMBERS_32                                                           \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MEGATRON_QWEN_NUMBERS_128                                                                \
  MEGATRON_QWEN_NUMBERS_64                                                                       \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MEGATRON_QWEN_OUTPUTS(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MEGATRON_QWEN_OUTPUTS_AT(i) \
  MEGATRON_QWEN_OUTPUTS(i), MEGATRON_QWEN_OUTPUTS(i + 8), MEGATRON_QWEN_OUTPUTS(i + 16), MEGATRON_QWEN_OUTPUTS(i + 24)
#define MEGATRON_QWEN_OUTPUTS_32 MEGATRON_QWEN_OUTPUTS_AT(0)
#define MEGATRON_QWEN_OUTPUTS_64 MEGATRON_QWEN_OUTPUTS_32, MEGATRON_QWEN_OUTPUTS_AT(32)
#define MEGATRON_QWEN_OUTPUTS_128 MEGATRON_QWEN_OUTPUTS_64, MEGATRON_QWEN_OUTPUTS_AT(64), MEGATRON_QWEN_OUTPUTS_AT(96)

// One instruction: its inputs are numbered behind the accumulators.
#define MEGATRON_QWEN_WGMMA(dtype, columns, count, adds_at, operands, ...)            \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_at                      \
               ", 0;\n"                                                               \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." dtype "." dtype \
               " {" MEGATRON_QWEN_NUMBERS_##count "}, " operands ";\n}\n"             \
               : MEGATRON_QWEN_OUTPUTS_##count                                        \
               : __VA_ARGS__)
#define MEGATRON_QWEN_WGMMA_OF(T, ...)               \
  if constexpr (std::is_same_v<T, __half>) {         \
    MEGATRON_QWEN_WGMMA("f16", __VA_ARGS__);         \
  } else {                                           \
    static_assert(std::is_same_v<T, __nv_bfloat16>); \
    MEGATRON_QWEN_WGMMA("bf16", __VA_ARGS__);        \
  }

// d = a b, or d += a b if `adds`, of a [64, 16] and b [16, N]. A transposed operand's neighbours in memory are
// neighbours along its 64 or N, else along the 16.
template <typename T, bool kTransposedA, bool kTransposedB, int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], std::uint64_t a, std::uint64_t b, bool adds) {
#define MEGATRON_QWEN_INPUTS "l"(a), "l"(b), "r"(adds ? 1 : 0), "n"(kTransposedA ? 1 : 0), "n"(kTransposedB ? 1 : 0)
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  if constexpr (kCount == 32) {
    MEGATRON_QWEN_WGMMA_OF(T, "64", 32, "%34", "%32, %33, adds, 1, 1, %35, %36", MEGATRON_QWEN_INPUTS)
  } else if constexpr (kCount == 64) {
    MEGATRON_QWEN_WGMMA_OF(T, "128", 64, "%66", "%64, %65, adds, 1, 1, %67, %68", MEGATRON_QWEN_INPUTS)
  } else {
    MEGATRON_QWEN_WGMMA_OF(T, "256", 128, "%130", "%128, %129, adds, 1, 1, %131, %132", MEGATRON_QWEN_INPUTS)
  }
#undef MEGATRON_QWEN_INPUTS
}

// The same of an `a` in registers, which stay as they are until the end of the multiplication. Register 2 i + h of a
// thread has row 16 warp + 8 h + lane / 4 and columns 8 i + 2 (lane % 4) and the next: accumulators 8 s ... 8 s + 7,
// packed in pairs, are columns 16 s and on of a product.
template <typename T, bool kTransposedB, int kCount>
__device__ __forceinline__ void multiply_registers(float (&d)[kCount], const std::uint32_t (&a)[4], std::uint64_t b,
                                                   bool adds) {
#define MEGATRON_QWEN_INPUTS \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds ? 1 : 0), "n"(kTransposedB ? 1 : 0)
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  if constexpr (kCount == 32) {
    MEGATRON_QWEN_WGMMA_OF(T, "64", 32, "%37", "{%32, %33, %34, %35}, %36, adds, 1, 1, %38", MEGATRON_QWEN_INPUTS)
  } else if constexpr (kCount == 64) {
    MEGATRON_QWEN_WGMMA_OF(T, "128", 64, "%69", "{%64, %65, %66, %67}, %68, adds, 1, 1, %70", MEGATRON_QWEN_INPUTS)
  } else {
    MEGATRON_QWEN_WGMMA_OF(T, "256", 128, "%133", "{%128, %129, %130, %131}, %132, adds, 1, 1, %134",
                           MEGATRON_QWEN_INPUTS)
  }
#undef MEGATRON_QWEN_INPUTS
}

#undef MEGATRON_QWEN_WGMMA_OF
#undef MEGATRON_QWEN_WGMMA
#undef MEGATRON_QWEN_OUTPUTS_128
#undef MEGATRON_QWEN_OUTPUTS_64
#undef MEGATRON_QWEN_OUTPUTS_32
#undef MEGATRON_QWEN_OUTPUTS_AT
#undef MEGATRON_QWEN_OUTPUTS
#undef MEGATRON_QWEN_NUMBERS_128
#undef MEGATRON_QWEN_NUMBERS_64
#undef MEGATRON_QWEN_NUMBERS_32

}  // namespace megatron_qwen::sm90
