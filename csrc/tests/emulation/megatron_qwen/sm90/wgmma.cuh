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
inline void pin(float (&)[kAccumulators]) {}

template <typename T, bool kTransposedA, bool kTransposedB>
void multiply(float (&d)[kAccumulators], std::uint64_t a, std::uint64_t b, bool adds) {
  emulation::multiply({d, a, b, kTransposedA, kTransposedB, adds, std::is_same_v<T, __half>});
}

}  // namespace megatron_qwen::sm90
