// Checks of parameters that kernels share. Each throws std::invalid_argument that names the operation, the argument,
// what it is and what it should be. No device is needed: a bad size is found before anything is launched.
#pragma once

#include <cstdint>

namespace megatron_qwen {

// gridDim.x of CUDA.
constexpr std::int64_t kMaxBlocks = 2147483647;

// One 16-byte access per thread.
constexpr std::int64_t kVectorBytes = 16;

void require_pointer(const char* op, const char* name, const void* pointer);
void require_aligned(const char* op, const char* name, const void* pointer, std::int64_t bytes);
void require_at_least(const char* op, const char* name, std::int64_t value, std::int64_t least);
void require_at_most(const char* op, const char* name, std::int64_t value, std::int64_t most);

inline bool is_multiple(const void* pointer, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(bytes) == 0;
}

inline std::int64_t ceil_divide(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace megatron_qwen
