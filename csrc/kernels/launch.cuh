// Launching and its errors, in one place. Kernels start by cudaLaunchKernelEx, never by <<<>>>: that is plain C++,
// which csrc/tests/emulation compiles without nvcc.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

// A kernel has to be allowed more.
constexpr int kSharedBytesUnasked = 48 * 1024;

// Throws std::runtime_error "op: what: cudaErrorName: description" unless the call succeeded.
void check_cuda(const char* op, const char* what, cudaError_t status);

// Throws std::invalid_argument for host memory: it would fault inside the kernel and poison the context for the rest
// of the process.
void require_on_device(const char* op, const char* name, const void* pointer);

// Of the current device.
int num_multiprocessors(const char* op);
// 9 of sm_90.
int compute_capability_major(const char* op);
// Throws std::runtime_error unless the current device is one.
void require_sm90(const char* op);

// Thread blocks of `kernel` that the current device holds at once.
template <typename Kernel>
std::int64_t resident_blocks(const char* op, Kernel* kernel, int threads) {
  int per_multiprocessor = 0;
  check_cuda(op, "cannot read the occupancy",
             cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0));
  return std::int64_t{num_multiprocessors(op)} * per_multiprocessor;
}

// Enqueues `kernel` on `stream` (a cudaStream_t), with dynamic shared memory. `blocks` is at most kMaxBlocks; the
// caller's check() saw to that.
template <typename... Parameters, typename... Arguments>
void launch_with_shared(const char* op, void (*kernel)(Parameters...), std::int64_t blocks, int threads,
                        int shared_bytes, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>(blocks));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  if (shared_bytes > kSharedBytesUnasked) {
    check_cuda(op, "cannot have so much shared memory",
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  check_cuda(op, "launch failed", cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
            const Arguments&... arguments) {
  launch_with_shared(op, kernel, blocks, threads, 0, stream, arguments...);
}

}  // namespace megatron_qwen
