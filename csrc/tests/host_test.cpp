// Host code without a device: exits 0, or prints what differed and exits 1.
#include <cstdint>
#include <iostream>
#include <stdexcept>
#include <string>

#include "megatron_qwen/build_info.h"
#include "megatron_qwen/copy_bandwidth.h"

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::cerr << "FAILED: " << what << "\n";
  ++failures;
}

megatron_qwen::CopyBandwidthParams copy(std::uintptr_t destination, std::uintptr_t source, std::int64_t num_bytes,
                                        std::int64_t num_blocks = 0) {
  return {reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), num_bytes, num_blocks, nullptr};
}

void expect_rejected(const megatron_qwen::CopyBandwidthParams& params, const std::string& words) {
  try {
    megatron_qwen::check(params);
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    expect(message.find(words) != std::string::npos, "message \"" + message + "\" does not say \"" + words + "\"");
    return;
  }
  expect(false, "accepted, though it should say \"" + words + "\"");
}

}  // namespace

int main() {
  using megatron_qwen::split_list;
  expect(split_list("").empty(), "an empty list has no element");
  expect(split_list("80,90a-real") == std::vector<std::string>{"80", "90a-real"}, "two architectures");

  const auto info = megatron_qwen::build_info();
  expect(!info.version.empty(), "version is set");
  expect(info.cuda_compiled == !info.cuda_architectures.empty(), "architectures are listed with CUDA and only then");

  megatron_qwen::check(copy(0, 0, 0));                 // nothing to copy: pointers are not looked at
  megatron_qwen::check(copy(0x1000, 0x2000, 0x1000));  // touching ends do not overlap
  megatron_qwen::check(copy(0x2000, 0x1000, 0x1000));
  expect_rejected(copy(0x1000, 0x2000, -1), "num_bytes = -1");
  expect_rejected(copy(0x1000, 0x2000, 16, -3), "num_blocks = -3");
  expect_rejected(copy(0x1000, 0x2000, 16, std::int64_t{1} << 31), "num_blocks = 2147483648");
  expect_rejected(copy(0, 0x2000, 16), "destination is a null pointer");
  expect_rejected(copy(0x1000, 0x2008, 16), "source = 0x2008");
  expect_rejected(copy(0x1000, 0x2000, 0x1001), "overlap in a copy of 4097 bytes");
  // 64-bit sizes: 4 GiB + 16 bytes must not be seen as 16.
  expect_rejected(copy(0x1000, 0x2000, (std::int64_t{1} << 32) + 16), "4294967312 bytes");

  if (failures == 0) std::cout << "host_test: all checks passed\n";
  return failures == 0 ? 0 : 1;
}
