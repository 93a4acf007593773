// Streaming device-to-device copy: the measured ceiling that memory-bound kernels are compared with.
#pragma once

#include <cstdint>

namespace megatron_qwen {

struct CopyBandwidthParams {
  void* destination;        // device memory, 16-byte aligned
  const void* source;       // device memory, 16-byte aligned, not overlapping destination
  std::int64_t num_bytes;   // >= 0; 0 returns without a launch
  std::int64_t num_blocks;  // thread blocks; 0 lets the launcher fill the device
  void* stream;             // cudaStream_t; nullptr is the legacy default stream
};

// Throws std::invalid_argument naming the offending value. Needs no device.
void check(const CopyBandwidthParams& params);

// Enqueues the copy on params.stream. Throws as check() does, std::invalid_argument for host pointers and
// std::runtime_error with CUDA's own words if the launch fails.
void copy_bandwidth(const CopyBandwidthParams& params);

}  // namespace megatron_qwen
