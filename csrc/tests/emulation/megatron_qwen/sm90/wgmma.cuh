// Stands in for the header of PTX instructions of this name (emulation.h, hopper.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "megatron_qwen/sm90/mbarrier.cuh"

namespace megatron_qwen::sm90 {

constexpr int kAccumulators = emulation::kAccumulators;

inline void begin_multiplications() {}
inline void commit_multiplications() { emulation::commit_multiplications(); }
template <int kPending>
void wait_for_multiplications() {
  emulation::wait_for_multiplications(kPending);
}
template <int kCount>
void pin(float (&)[kCount]) {}
template <int kCount>
void pin(std::uint32_t (&)[kCount][4]) {}

template <typename T, bool kTransposedA, bool kTransposedB, int kCount>
void multiply(float (&d)[kCount], std::uint64_t a, std::uint64_t b, bool adds) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  emulation::multiply({d, 2 * kCount, a, b, {}, false, kTransposedA, kTransposedB, adds, std::is_same_v<T, __half>});
}

template <typename T, bool kTransposedB, int kCount>
void multiply_registers(float (&d)[kCount], const std::uint32_t (&a)[4], std::uint64_t b, bool adds) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  emulation::multiply(
      {d, 2 * kCount, 0, b, {a[0], a[1], a[2], a[3]}, true, false, kTransposedB, adds, std::is_same_v<T, __half>});
}

}  // namespace megatron_qwen::sm90
