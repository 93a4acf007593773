// Stands in for the header of PTX instructions of this name (emulation.h, hopper.h).
#pragma once

#include "cuda_runtime.h"
#include "hopper.h"

#define MEGATRON_QWEN_SM90 1

namespace megatron_qwen::sm90 {

using Barrier = std::uint64_t;

inline unsigned char* dynamic_shared() { return emulation::shared_memory(); }
inline std::uint32_t shared_address(const void* pointer) { return emulation::shared_address(pointer); }

inline void initialize(Barrier* barrier, std::uint32_t arrivals) { emulation::barrier_initialize(barrier, arrivals); }
inline void fence_initialized_barriers() {}
inline void arrive(Barrier* barrier) { emulation::barrier_arrive(barrier, 0); }
inline void arrive_and_expect(Barrier* barrier, std::uint32_t bytes) { emulation::barrier_arrive(barrier, bytes); }
inline void wait(Barrier* barrier, std::uint32_t parity) { emulation::barrier_wait(barrier, parity); }

template <int kThreads>
void sync_threads(int barrier) {
  emulation::named_barrier(barrier, kThreads, true);
}
template <int kThreads>
void arrive_threads(int barrier) {
  emulation::named_barrier(barrier, kThreads, false);
}

inline void store_16_bytes(std::uint32_t address, const uint4& value) { emulation::store_16_bytes(address, &value); }
inline float exp2_fast(float x) { return std::exp2(x); }

template <int kCount>
void give_up_registers() {
  emulation::change_registers(kCount);
}
template <int kCount>
void take_registers() {
  emulation::change_registers(kCount);
}

}  // namespace megatron_qwen::sm90
