#include "hopper.h"

#include <cuda.h>

#include <array>
#include <cstring>
#include <deque>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulation {
namespace {

constexpr std::uint32_t kSwizzledRow = 128;
// What moves as a whole. Rows of our matrices are multiples of it, so all of it is inside or outside of one.
constexpr std::uint32_t kChunk = 16;
constexpr int kDepth = 16, kRows = 64, kMostColumns = 256;

[[noreturn]] void fail(const std::string& what) {
  std::ostringstream message;
  message << "emulation: " << what << ", thread " << threadIdx.x << " of block " << blockIdx.x;
  throw std::runtime_error(message.str());
}

struct BarrierState {
  std::uint16_t arrivals;
  std::int16_t pending;
  std::uint32_t phase : 1;
  std::int32_t bytes : 31;
};
static_assert(sizeof(BarrierState) == sizeof(std::uint64_t));

struct BoxCopy {
  std::uint32_t destination;
  CUtensorMap map;
  std::uint64_t* barrier;
  Coordinates at;
};

struct SmallCopy {
  std::uint32_t destination;
  const void* source;
};

// Multiplications of a thread that may be under way.
constexpr std::uint64_t kMostUnderWay = 64;

// Decoded operands of the newest multiplications of a warpgroup: the first thread that comes to one decodes them.
struct Operands {
  std::uint64_t number = 0, a = 0, b = 0;
  std::array<float, kRows * kDepth> rows;
  std::array<float, kMostColumns * kDepth> columns;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  std::uint64_t phase = 0;
};

struct Thread {
  std::vector<SmallCopy> copies;
  std::deque<std::vector<SmallCopy>> copy_groups;
  std::vector<std::uint32_t> unfenced;
  std::vector<Multiplication> multiplications;
  std::deque<std::vector<Multiplication>> multiplication_groups;
  std::uint64_t issued = 0, multiplied = 0;
  std::array<std::array<std::uint32_t, 4>, kMostUnderWay> fragments;
  int registers = 0;
};

struct alignas(1024) Arena {
  unsigned char bytes[kMostSharedBytes];
};

Arena arena;
std::size_t arena_bytes = 0;
// Of each 16 bytes: whether the generic proxy wrote them, and no fence came after it.
std::vector<bool> unfenced;
std::vector<Thread> threads;
std::vector<BoxCopy> boxes;
bool copies_at_once = false;
std::vector<std::array<Operands, 16>> operands;
std::array<NamedBarrier, 16> named_barriers;

Thread& self() { return threads[threadIdx.x]; }

void require_inside(std::uint32_t address, std::size_t bytes) {
  if (address + bytes > arena_bytes) fail("shared memory at " + std::to_string(address) + " was not asked for");
}

BarrierState& state_of(std::uint64_t* barrier) {
  shared_address(barrier);
  return *reinterpret_cast<BarrierState*>(barrier);
}

void end_phase_if_complete(BarrierState& state) {
  if (state.pending < 0) fail("more arrivals at a barrier than it expects");
  if (state.pending != 0 || state.bytes != 0) return;
  state.phase ^= 1;
  state.pending = static_cast<std::int16_t>(state.arrivals);
}

// Swizzle 128B: the 16 bytes at place c of a row of 128 go to place c ^ (row % 8).
std::uint32_t swizzled(std::uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Where TMA finds column `column` of a row of a box; null outside of the tensor.
const void* source_of(const BoxCopy& copy, std::int64_t row, std::int64_t column) {
  const CUtensorMap& map = copy.map;
  std::uintptr_t source = map.address;
  for (std::uint32_t axis = 0; axis < map.rank; ++axis) {
    const std::int64_t at = copy.at[axis] + (axis == 0 ? column : axis == 1 ? row : 0);
    if (at < 0 || at >= static_cast<std::int64_t>(map.sizes[axis])) return nullptr;
    source += static_cast<std::uint64_t>(at) * map.strides[axis];
  }
  return reinterpret_cast<const void*>(source);
}

void perform(const BoxCopy& copy) {
  const CUtensorMap& map = copy.map;
  std::uint32_t linear = copy.destination;
  for (std::int64_t row = 0; row < map.box_rows; ++row, linear += kSwizzledRow) {
    for (std::uint32_t at = 0; at < kSwizzledRow; at += kChunk) {
      unsigned char* destination = arena.bytes + swizzled(linear + at);
      if (const void* source = source_of(copy, row, at / map.element_bytes)) {
        check_access("a read by TMA", source, kChunk);
        std::memcpy(destination, source, kChunk);
      } else {
        std::memset(destination, 0, kChunk);
      }
      unfenced[(destination - arena.bytes) / 16] = false;
    }
  }
  BarrierState& state = state_of(copy.barrier);
  state.bytes -= static_cast<std::int32_t>(map.box_rows * kSwizzledRow);
  end_phase_if_complete(state);
}

void perform(const SmallCopy& copy) {
  if (copy.source == nullptr) {
    std::memset(arena.bytes + copy.destination, 0, 16);
  } else {
    check_access("a copy", copy.source, 16);
    std::memcpy(arena.bytes + copy.destination, copy.source, 16);
  }
  unfenced[copy.destination / 16] = true;
  self().unfenced.push_back(copy.destination / 16);
}

float to_float(std::uint16_t bits, bool is_half) { return is_half ? __half2float({bits}) : __bfloat162float({bits}); }

// One element of an operand, by the matrix descriptor.
float element(std::uint64_t descriptor, bool transposed, bool is_half, std::uint32_t outer, std::uint32_t depth) {
  if (descriptor >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) fail("a matrix descriptor with a base offset");
  const auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const std::uint32_t start = field(0), leading = field(16), stride = field(32);
  const std::uint32_t linear =
      transposed ? start + outer / 64 * leading + depth / 8 * stride + depth % 8 * kSwizzledRow + outer % 64 * 2
                 : start + outer / 8 * stride + outer % 8 * kSwizzledRow + depth * 2;
  const std::uint32_t address = swizzled(linear);
  require_inside(address, 2);
  if (unfenced[address / 16]) fail("wgmma reads shared memory that was written without a fence for the async proxy");
  std::uint16_t bits;
  std::memcpy(&bits, arena.bytes + address, sizeof(bits));
  return to_float(bits, is_half);
}

// Row and number k of an operand in the registers of the four threads of a quad.
float element_in_registers(std::uint64_t number, bool is_half, std::uint32_t row, std::uint32_t k) {
  const std::uint32_t warpgroup = threadIdx.x / kWarpgroupSize;
  const std::uint32_t lane = row % 8 * 4 + k % 8 / 2;
  const Thread& owner = threads[warpgroup * kWarpgroupSize + row / 16 * kWarpSize + lane];
  if (owner.issued < number) fail("wgmma reads registers of a thread that has not come to it");
  const std::uint32_t pair = owner.fragments[number % kMostUnderWay][k / 8 * 2 + row % 16 / 8];
  return to_float(static_cast<std::uint16_t>(k % 2 == 0 ? pair : pair >> 16), is_half);
}

const Operands& decoded(const Multiplication& given, std::uint64_t number) {
  Operands& found = operands[threadIdx.x / kWarpgroupSize][number % 16];
  if (found.number == number) {
    if (found.a != given.a || found.b != given.b) fail("threads of a warpgroup disagree on the operands of wgmma");
    return found;
  }
  found.number = number;
  found.a = given.a;
  found.b = given.b;
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    for (std::uint32_t row = 0; row < kRows && !given.in_registers; ++row) {
      found.rows[row * kDepth + k] = element(given.a, given.transposed_a, given.is_half, row, k);
    }
    for (std::uint32_t column = 0; column < static_cast<std::uint32_t>(given.columns); ++column) {
      found.columns[column * kDepth + k] = element(given.b, given.transposed_b, given.is_half, column, k);
    }
  }
  return found;
}

void perform(const Multiplication& given) {
  const std::uint64_t number = ++self().multiplied;
  const Operands& of = decoded(given, number);
  const std::uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % 4;
  float rows[2][kDepth];
  for (std::uint32_t half = 0; half < 2; ++half) {
    const std::uint32_t row = 16 * warp + lane / 4 + 8 * half;
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      rows[half][k] =
          given.in_registers ? element_in_registers(number, given.is_half, row, k) : of.rows[row * kDepth + k];
    }
  }
  for (std::uint32_t j = 0; j < static_cast<std::uint32_t>(given.columns) / 8; ++j) {
    for (std::uint32_t part = 0; part < 4; ++part) {
      const float* row = rows[part / 2];
      const float* column = &of.columns[(8 * j + 2 * (lane % 4) + part % 2) * kDepth];
      float sum = 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += row[k] * column[k];
      float& d = given.d[4 * j + part];
      d = given.adds ? d + sum : sum;
    }
  }
}

}  // namespace

unsigned char* shared_memory() { return arena.bytes; }

std::uint32_t shared_address(const void* pointer) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  if (at < arena.bytes || at >= arena.bytes + arena_bytes) fail("an address outside of shared memory");
  return static_cast<std::uint32_t>(at - arena.bytes);
}

void barrier_initialize(std::uint64_t* barrier, std::uint32_t arrivals) {
  state_of(barrier) = {static_cast<std::uint16_t>(arrivals), static_cast<std::int16_t>(arrivals), 0, 0};
}

void barrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes) {
  BarrierState& state = state_of(barrier);
  state.bytes += static_cast<std::int32_t>(expected_bytes);
  --state.pending;
  end_phase_if_complete(state);
}

void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  const BarrierState& state = state_of(barrier);
  wait_until([&] { return state.phase != parity; });
}

void change_registers(int count) {
  if (count % 8 != 0 || count < 24 || count > 256) fail("setmaxnreg takes a multiple of 8 from 24 to 256");
  self().registers = count;
}

void named_barrier(int number, int count, bool waits) {
  if (number < 1 || number > 15) fail("a named barrier has a number from 1 to 15");
  NamedBarrier& barrier = named_barriers[number];
  if (barrier.arrived != 0 && barrier.expected != count) fail("a named barrier is awaited for two numbers of threads");
  barrier.expected = count;
  const std::uint64_t phase = barrier.phase;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  if (waits) wait_until([&barrier, phase] { return barrier.phase != phase; });
}

void store_16_bytes(std::uint32_t destination, const void* source) {
  if (destination % 16 != 0) fail("a misaligned write to shared memory");
  require_inside(destination, 16);
  std::memcpy(arena.bytes + destination, source, 16);
  unfenced[destination / 16] = true;
  self().unfenced.push_back(destination / 16);
}

void copy_box(void* destination, const CUtensorMap& map, std::uint64_t* barrier, const Coordinates& at) {
  const std::uint32_t address = shared_address(destination);
  if (address % 1024 != 0) fail("the box of a swizzled TMA copy does not start at a multiple of 1024 bytes");
  require_inside(address, map.box_rows * kSwizzledRow);
  boxes.push_back({address, map, barrier, at});
  if (copies_at_once) perform_one_copy();
}

void copy_16_bytes(std::uint32_t destination, const void* source) {
  if (destination % 16 != 0) fail("cp.async to a misaligned address");
  require_inside(destination, 16);
  self().copies.push_back({destination, source});
}

void commit_copies() { self().copy_groups.push_back(std::exchange(self().copies, {})); }

void wait_for_copies(std::size_t pending) {
  for (auto& groups = self().copy_groups; groups.size() > pending; groups.pop_front()) {
    for (const SmallCopy& copy : groups.front()) perform(copy);
  }
}

void fence_for_async_proxy() {
  for (const std::uint32_t at : std::exchange(self().unfenced, {})) unfenced[at] = false;
}

void multiply(const Multiplication& multiplication) {
  Thread& thread = self();
  if (++thread.issued - thread.multiplied > kMostUnderWay) fail("too many multiplications under way");
  thread.fragments[thread.issued % kMostUnderWay] = multiplication.registers;
  thread.multiplications.push_back(multiplication);
}

void commit_multiplications() { self().multiplication_groups.push_back(std::exchange(self().multiplications, {})); }

void wait_for_multiplications(std::size_t pending) {
  warp_barrier();  // wgmma is an instruction of whole warps: operands in registers are those of all their threads
  for (auto& groups = self().multiplication_groups; groups.size() > pending; groups.pop_front()) {
    for (const Multiplication& each : groups.front()) perform(each);
  }
}

void start_hopper(std::size_t count, std::size_t shared_bytes) {
  if (shared_bytes > kMostSharedBytes) throw std::runtime_error("emulation: more shared memory than sm_90 has");
  arena_bytes = shared_bytes;
  std::memset(arena.bytes, 0xff, shared_bytes);
  unfenced.assign(shared_bytes / 16 + 1, false);
  threads.assign(count, {});
  boxes.clear();
  operands.assign(count / kWarpgroupSize + 1, {});
  named_barriers.fill({});
}

void finish_hopper() {
  if (!boxes.empty()) throw std::runtime_error("emulation: a block ended before its TMA copies");
  std::size_t registers = 0;
  for (const Thread& each : threads) {
    registers += static_cast<std::size_t>(each.registers);
    if (each.copies.empty() && each.copy_groups.empty() && each.multiplications.empty() &&
        each.multiplication_groups.empty()) {
      continue;
    }
    throw std::runtime_error("emulation: a thread ended before its copies or multiplications");
  }
  if (registers > kRegisters / threads.size() / 8 * 8 * threads.size())
    throw std::runtime_error("emulation: setmaxnreg asks for too much");
}

void set_copies_at_once(bool at_once) { copies_at_once = at_once; }

bool perform_one_copy() {
  if (boxes.empty()) return false;
  const BoxCopy copy = boxes.back();
  boxes.pop_back();
  perform(copy);
  return true;
}

}  // namespace emulation

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr cuuint64_t kBytes = 2;
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  bool fits = (rank == 2 || rank == 4) && at % 16 == 0 && sizes[0] * kBytes % 16 == 0 && box[0] * kBytes == 128 &&
              swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  *map = {at, {}, {kBytes}, box[1], kBytes, rank, {}};
  for (cuuint32_t axis = 0; axis < rank && fits; ++axis) {
    map->sizes[axis] = sizes[axis];
    fits = sizes[axis] >= 1 && sizes[axis] <= (1ull << 32) && element_strides[axis] == 1 && box[axis] >= 1 &&
           box[axis] <= (axis < 2 ? 256 : 1);
    if (axis == 0) continue;
    map->strides[axis] = strides[axis - 1];
    fits = fits && strides[axis - 1] % 16 == 0 && strides[axis - 1] < (1ull << 40);
  }
  if (rank == 2) fits = fits && strides[0] >= sizes[0] * kBytes;
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
