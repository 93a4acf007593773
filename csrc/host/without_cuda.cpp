// The launchers of a build without CUDA: they check their parameters as ever and then say what is missing.
#include <stdexcept>
#include <string>

#include "megatron_qwen/column_sum.h"
#include "megatron_qwen/copy_bandwidth.h"

namespace megatron_qwen {
namespace {

template <typename Params>
[[noreturn]] void refuse(const char* op, const Params& params) {
  check(params);
  throw std::runtime_error(std::string(op) +
                           ": megatron_qwen._C was built without CUDA kernels; reinstall where nvcc is, with "
                           "MEGATRON_QWEN_CUDA=on");
}

}  // namespace

void column_sum(const ColumnSumParams& params) { refuse("column_sum", params); }
void copy_bandwidth(const CopyBandwidthParams& params) { refuse("copy_bandwidth", params); }

}  // namespace megatron_qwen
