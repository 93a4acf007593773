// What device tests share: memory between guards, values that a dtype holds exactly, comparison with fp64.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "megatron_qwen/dtype.h"

namespace {

using megatron_qwen::DType;
using Values = std::vector<double>;

constexpr std::size_t kGuardBytes = 64;
constexpr unsigned char kPoison = 0xFF;  // NaN in every dtype

bool passed = true;

void require(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

template <typename T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<__nv_bfloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<__half> = DType::kFloat16;

// One rounding of the largest value; fp32 sums take more than one.
template <typename T>
constexpr double kTolerance = 1e-5;
template <>
constexpr double kTolerance<__nv_bfloat16> = 0x1p-8;
template <>
constexpr double kTolerance<__half> = 0x1p-11;

// Device memory between two guards, all of it poisoned at first.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : count_(count) {
    require(cudaMalloc(&memory_, bytes()));
    require(cudaMemset(memory_, kPoison, bytes()));
  }
  explicit Buffer(const Values& values) : Buffer(values.size()) {
    std::vector<T> rounded(values.begin(), values.end());
    require(cudaMemcpy(data(), rounded.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return reinterpret_cast<T*>(static_cast<unsigned char*>(memory_) + kGuardBytes); }

  Values read(const std::string& name) const {
    std::vector<unsigned char> all(bytes());
    require(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost));
    const auto intact = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(all.begin(), all.begin() + kGuardBytes, intact) ||
        !std::all_of(all.end() - kGuardBytes, all.end(), intact)) {
      std::fprintf(stderr, "FAILED: %s: written outside\n", name.c_str());
      passed = false;
    }
    const T* inside = reinterpret_cast<const T*>(all.data() + kGuardBytes);
    Values result(count_);
    for (std::size_t i = 0; i < count_; ++i) result[i] = static_cast<double>(static_cast<float>(inside[i]));
    return result;
  }

 private:
  std::size_t bytes() const { return count_ * sizeof(T) + 2 * kGuardBytes; }

  std::size_t count_;
  void* memory_ = nullptr;
};

// Values in (-scale, scale) that T holds exactly.
template <typename T>
Values random_values(std::size_t count, std::uint32_t seed, double scale) {
  Values result(count);
  for (double& value : result) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(T(static_cast<float>((seed / 2147483648.0 - 1.0) * scale)));
  }
  return result;
}

template <typename T>
void expect_close(const std::string& name, const Buffer<T>& ours, const Values& exact,
                  double tolerance = kTolerance<T>) {
  const Values found = ours.read(name);
  double largest = 0.0, error = 0.0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    largest = std::max(largest, std::fabs(exact[i]));
    const double difference = std::fabs(found[i] - exact[i]);
    error = std::isnan(error) || difference <= error ? error : difference;  // NaN stays
  }
  if (error <= tolerance * largest) return;
  std::fprintf(stderr, "FAILED: %s: error %g, largest value %g\n", name.c_str(), error, largest);
  passed = false;
}

inline bool has_device(const char* program) {
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) return true;
  std::printf("%s: no CUDA device, skipped\n", program);
  return false;
}

}  // namespace
