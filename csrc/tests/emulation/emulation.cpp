#include "emulation.h"

#include <cuda.h>
#include <ucontext.h>

#include <array>
#include <exception>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "hopper.h"

emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

// Parameters of a kernel are up to 32 KiB, and each thread has them on its stack.
constexpr std::size_t kStackBytes = 128 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kWaiting, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  State state = State::kReady;
  std::function<bool()> condition;  // of kWaiting
  Index index;
};

struct Warp {
  std::array<std::uint64_t, kWarpSize> values;
};

struct Range {
  std::uintptr_t begin;
  std::uint64_t bytes;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<Range> allowed;
std::map<std::uint64_t, std::uint64_t> accesses;
int multiprocessors = 2;
bool runs_backwards = false;

ucontext_t scheduler;
std::size_t current = 0;
const std::function<void()>* body = nullptr;
std::exception_ptr failure;

void trampoline() {
  try {
    (*body)();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current]->state = State::kDone;
}

void wait(State state) {
  fibers[current]->state = state;
  swapcontext(&fibers[current]->context, &scheduler);
}

void start(Fiber& fiber) {
  fiber.state = State::kReady;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, trampoline, 0);
}

bool all_in(std::size_t begin, std::size_t end, State state) {
  for (std::size_t i = begin; i < end; ++i) {
    if (fibers[i]->state != state) return false;
  }
  return true;
}

void release(std::size_t begin, std::size_t end) {
  for (std::size_t i = begin; i < end; ++i) fibers[i]->state = State::kReady;
}

// After every thread went as far as it can: lets go those that wait for nobody any more.
bool release_barriers(std::size_t threads) {
  bool released = false;
  for (std::size_t first = 0; first < threads; first += kWarpSize) {
    const std::size_t end = first + kWarpSize;
    if (end > threads || !all_in(first, end, State::kAtWarpBarrier)) continue;
    release(first, end);
    released = true;
  }
  if (!released && all_in(0, threads, State::kAtBlockBarrier)) {
    release(0, threads);
    released = true;
  }
  return released;
}

[[noreturn]] void report_deadlock(std::size_t threads) {
  std::ostringstream message;
  message << "emulation: block " << blockIdx.x
          << ": some threads wait at a barrier or a shuffle that others do not reach:";
  for (std::size_t i = 0; i < threads; ++i) message << " " << static_cast<int>(fibers[i]->state);
  throw std::runtime_error(message.str());
}

bool can_run(Fiber& fiber) {
  if (fiber.state == State::kWaiting && fiber.condition()) fiber.state = State::kReady;
  return fiber.state == State::kReady;
}

void run_block(std::size_t threads, std::size_t shared_bytes) {
  start_hopper(threads, shared_bytes);
  for (std::size_t i = 0; i < threads; ++i) start(*fibers[i]);
  while (!all_in(0, threads, State::kDone)) {
    bool ran = false;
    for (std::size_t i = 0; i < threads; ++i) {
      current = runs_backwards ? threads - 1 - i : i;
      if (!can_run(*fibers[current])) continue;
      threadIdx = fibers[current]->index;
      swapcontext(&scheduler, &fibers[current]->context);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      ran = true;
    }
    if (!ran && !release_barriers(threads) && !perform_one_copy()) report_deadlock(threads);
  }
  finish_hopper();
}

}  // namespace

void run(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& thread) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("emulation: a block has 1 to 1024 threads");
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  warps.resize((threads + kWarpSize - 1) / kWarpSize);
  for (std::size_t i = 0; i < threads; ++i) {
    const auto linear = static_cast<unsigned int>(i);
    fibers[i]->index = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
  }
  body = &thread;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads, shared_bytes);
    }
  }
}

void block_barrier() { wait(State::kAtBlockBarrier); }
void warp_barrier() { wait(State::kAtWarpBarrier); }
void wait_until(const std::function<bool()>& condition) {
  if (condition()) return;
  fibers[current]->condition = condition;
  wait(State::kWaiting);
}
unsigned int lane() { return static_cast<unsigned int>(current % kWarpSize); }

std::uint64_t shuffle(std::uint64_t value, unsigned int source) {
  auto& values = warps[current / kWarpSize].values;
  values[lane()] = value;
  warp_barrier();
  const std::uint64_t result = values[source % kWarpSize];
  warp_barrier();
  return result;
}

void check_access(const char* what, const void* address, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  const char* fault = begin % bytes != 0 ? "misaligned" : "outside of every tensor";
  if (begin % bytes == 0) {
    for (const Range& range : allowed) {
      if (begin < range.begin || begin - range.begin + bytes > range.bytes) continue;
      ++accesses[bytes];
      return;
    }
  }
  std::ostringstream message;
  message << "emulation: " << what << " of " << bytes << " bytes at 0x" << std::hex << begin << std::dec
          << " by thread " << threadIdx.x << " of block " << blockIdx.x << " is " << fault;
  throw std::runtime_error(message.str());
}

}  // namespace emulation

void emulation_allow(std::uintptr_t address, std::uint64_t bytes) { emulation::allowed.push_back({address, bytes}); }

void emulation_forget_memory() { emulation::allowed.clear(); }
void emulation_clear_accesses() { emulation::accesses.clear(); }
std::uint64_t emulation_accesses(std::uint64_t bytes) { return emulation::accesses[bytes]; }
void emulation_set_multiprocessors(int count) { emulation::multiprocessors = count; }
void emulation_set_other_order(bool other) {
  emulation::set_copies_at_once(other);
  emulation::runs_backwards = other;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::multiprocessors : 9;  // the imagined device: sm_90
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  attributes->type = cudaMemoryTypeDevice;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
