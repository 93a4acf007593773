// What emulates instructions of sm_90a: TMA, mbarriers, cp.async, wgmma. All that is asynchronous happens as late as
// the program allows: copies of TMA once no thread can go on without them, the newest first (or, if a test asks for
// it, at once, which shows a stage that was given back too early); cp.async and wgmma when they are waited for. Shared
// memory is full of NaN when a block starts. Source: PTX ISA 9.0: "Tensor swizzling modes", "Matrix descriptor",
// "Register fragments" of wgmma, "mbarrier".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

struct CUtensorMap;

namespace emulation {

constexpr int kAccumulators = 128;  // of a product [64, 256]
constexpr std::size_t kWarpgroupSize = 128;
// What a block of sm_90 may have.
constexpr std::size_t kMostSharedBytes = 232448;
// Of a multiprocessor. A block gets as many per thread as all of its threads can have, in steps of 8; setmaxnreg moves
// them between its warpgroups.
constexpr std::size_t kRegisters = 65536;

unsigned char* shared_memory();
// Throws for an address outside of the shared memory that the launch asked for.
std::uint32_t shared_address(const void* pointer);

void barrier_initialize(std::uint64_t* barrier, std::uint32_t arrivals);
void barrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes);
void barrier_wait(std::uint64_t* barrier, std::uint32_t parity);
void change_registers(int count);

// Barriers 1 to 15 of the block, for `count` threads.
void named_barrier(int number, int count, bool waits);
void store_16_bytes(std::uint32_t destination, const void* source);

// Where a box of a matrix, or of the rows of a head, begins: innermost first.
using Coordinates = std::array<std::int32_t, 4>;
void copy_box(void* destination, const CUtensorMap& map, std::uint64_t* barrier, const Coordinates& at);
// Zeros without a source.
void copy_16_bytes(std::uint32_t destination, const void* source);
void commit_copies();
void wait_for_copies(std::size_t pending);
void fence_for_async_proxy();

struct Multiplication {
  float* d;
  int columns;
  std::uint64_t a, b;
  std::array<std::uint32_t, 4> registers;  // a, if it is in registers
  bool in_registers;
  bool transposed_a, transposed_b, adds, is_half;
};
void multiply(const Multiplication& multiplication);
void commit_multiplications();
void wait_for_multiplications(std::size_t pending);

// For the scheduler: when a block starts, and when it ends, where nothing may be under way any more.
void start_hopper(std::size_t threads, std::size_t shared_bytes);
void finish_hopper();
// Performs an outstanding copy of TMA; false if there is none.
bool perform_one_copy();
void set_copies_at_once(bool at_once);

}  // namespace emulation
