#include <sstream>
#include <stdexcept>

#include "megatron_qwen/check.h"
#include "megatron_qwen/copy_bandwidth.h"

namespace megatron_qwen {

void check(const CopyBandwidthParams& params) {
  constexpr const char* kOp = "copy_bandwidth";
  require_at_least(kOp, "num_bytes", params.num_bytes, 0);
  require_at_least(kOp, "num_blocks", params.num_blocks, 0);  // 0 is automatic
  require_at_most(kOp, "num_blocks", params.num_blocks, kMaxBlocks);
  if (params.num_bytes == 0) return;
  require_aligned(kOp, "destination", params.destination, kVectorBytes);
  require_aligned(kOp, "source", params.source, kVectorBytes);
  const auto destination = reinterpret_cast<std::uintptr_t>(params.destination);
  const auto source = reinterpret_cast<std::uintptr_t>(params.source);
  const std::uintptr_t distance = destination > source ? destination - source : source - destination;
  if (distance < static_cast<std::uintptr_t>(params.num_bytes)) {
    std::ostringstream message;
    message << kOp << ": source and destination are " << distance << " bytes apart and overlap in a copy of "
            << params.num_bytes << " bytes";
    throw std::invalid_argument(message.str());
  }
}

}  // namespace megatron_qwen
