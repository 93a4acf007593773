// On a device: every byte arrives, nothing behind the end is touched. Exits 77 (skipped) where there is none.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "megatron_qwen/copy_bandwidth.h"

namespace {

constexpr std::int64_t kGuardBytes = 64;
constexpr unsigned char kGuard = 0xA5;

void require(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

bool copies(std::int64_t num_bytes, std::int64_t num_blocks) {
  std::vector<unsigned char> pattern(num_bytes);
  for (std::int64_t i = 0; i < num_bytes; ++i) pattern[i] = static_cast<unsigned char>((i * 131 + i / 251) & 0xff);
  void* source = nullptr;
  void* destination = nullptr;
  require(cudaMalloc(&source, num_bytes + kGuardBytes));
  require(cudaMalloc(&destination, num_bytes + kGuardBytes));
  require(cudaMemcpy(source, pattern.data(), num_bytes, cudaMemcpyHostToDevice));
  require(cudaMemset(destination, kGuard, num_bytes + kGuardBytes));
  megatron_qwen::copy_bandwidth({destination, source, num_bytes, num_blocks, nullptr});
  std::vector<unsigned char> result(num_bytes + kGuardBytes);
  require(cudaMemcpy(result.data(), destination, result.size(), cudaMemcpyDeviceToHost));
  require(cudaFree(source));
  require(cudaFree(destination));
  for (std::int64_t i = 0; i < num_bytes + kGuardBytes; ++i) {
    const unsigned char expected = i < num_bytes ? pattern[i] : kGuard;
    if (result[i] == expected) continue;
    std::fprintf(stderr, "FAILED: %lld bytes, %lld blocks: byte %lld is %d, expected %d\n", (long long)num_bytes,
                 (long long)num_blocks, (long long)i, result[i], expected);
    return false;
  }
  return true;
}

}  // namespace

int main() {
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) != cudaSuccess || num_devices == 0) {
    std::puts("copy_bandwidth_device_test: no CUDA device, skipped");
    return 77;
  }
  bool passed = true;
  for (std::int64_t num_bytes : {0LL, 1LL, 15LL, 16LL, 17LL, 4095LL, 4096LL * 4, 1048573LL, 67108864LL + 13}) {
    for (std::int64_t num_blocks : {0LL, 1LL, 7LL, 100000LL}) passed = copies(num_bytes, num_blocks) && passed;
  }
  alignas(16) unsigned char on_host[32];
  try {
    megatron_qwen::copy_bandwidth({on_host, on_host + 16, 16, 0, nullptr});
    std::fputs("FAILED: host memory was accepted\n", stderr);
    passed = false;
  } catch (const std::invalid_argument&) {
  }
  if (passed) std::puts("copy_bandwidth_device_test: all checks passed");
  return passed ? 0 : 1;
}
