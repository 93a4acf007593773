#include <sstream>
#include <stdexcept>

#include "megatron_qwen/copy_bandwidth.h"

namespace megatron_qwen {
namespace {

// gridDim.x of CUDA.
constexpr std::int64_t kMaxBlocks = 2147483647;

[[noreturn]] void reject(const std::ostringstream& message) { throw std::invalid_argument(message.str()); }

void check_pointer(const char* name, std::uintptr_t address) {
  std::ostringstream message;
  if (address == 0) {
    message << "copy_bandwidth: " << name << " is a null pointer; expected device memory";
    reject(message);
  }
  if (address % kCopyAlignment != 0) {
    message << "copy_bandwidth: " << name << " = 0x" << std::hex << address << std::dec << " is not a multiple of "
            << kCopyAlignment << " bytes; pass the start of an allocation or an aligned slice";
    reject(message);
  }
}

}  // namespace

void check(const CopyBandwidthParams& params) {
  std::ostringstream message;
  if (params.num_bytes < 0) {
    message << "copy_bandwidth: num_bytes = " << params.num_bytes << "; expected 0 or more";
    reject(message);
  }
  if (params.num_blocks < 0 || params.num_blocks > kMaxBlocks) {
    message << "copy_bandwidth: num_blocks = " << params.num_blocks << "; expected 0 (automatic) to " << kMaxBlocks;
    reject(message);
  }
  if (params.num_bytes == 0) return;
  const auto destination = reinterpret_cast<std::uintptr_t>(params.destination);
  const auto source = reinterpret_cast<std::uintptr_t>(params.source);
  check_pointer("destination", destination);
  check_pointer("source", source);
  const std::uintptr_t distance = destination > source ? destination - source : source - destination;
  if (distance < static_cast<std::uintptr_t>(params.num_bytes)) {
    message << "copy_bandwidth: source and destination are " << distance << " bytes apart and overlap in a copy of "
            << params.num_bytes << " bytes";
    reject(message);
  }
}

}  // namespace megatron_qwen
