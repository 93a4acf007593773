// Runs kernels on a CPU, for tests: what the fake cuda_runtime.h beside this file stands on.
// The threads of a block are fibers that switch at barriers and shuffles; blocks run one after the other. What sm_90
// has beyond that is in hopper.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

constexpr unsigned int kWarpSize = 32;

struct Index {
  unsigned int x = 1, y = 1, z = 1;
};

// Runs `thread` once per thread of every block. Throws std::runtime_error for a bad access, or where some threads of a
// block (of a warp) wait at a barrier (a shuffle) that the others do not reach. A block has `shared_bytes` of dynamic
// shared memory.
void run(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& thread);

void block_barrier();
void warp_barrier();
void wait_until(const std::function<bool()>& condition);

// The value that the thread `lane` of this warp passed in. Every thread of the warp calls it.
std::uint64_t shuffle(std::uint64_t value, unsigned int lane);
unsigned int lane();

// Throws unless `bytes` at `address` are a multiple of their size, and inside one of the tensors that were allowed.
void check_access(const char* what, const void* address, std::size_t bytes);

}  // namespace emulation

// Of the thread that runs now, under the names kernels know them by.
extern emulation::Index threadIdx, blockIdx, blockDim, gridDim;

// For Python, through ctypes: the memory that kernels may touch, and how many accesses of a size they made; an order of
// events in which TMA copies at once and the last thread runs first.
extern "C" {
__attribute__((visibility("default"))) void emulation_allow(std::uintptr_t address, std::uint64_t bytes);
__attribute__((visibility("default"))) void emulation_forget_memory();
__attribute__((visibility("default"))) void emulation_clear_accesses();
__attribute__((visibility("default"))) std::uint64_t emulation_accesses(std::uint64_t bytes);
__attribute__((visibility("default"))) void emulation_set_multiprocessors(int count);
__attribute__((visibility("default"))) void emulation_set_other_order(bool other);
}
