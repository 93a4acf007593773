// The one place that knows Python: megatron_qwen._C. Tensors arrive as addresses (tensor.data_ptr()).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>

#include "megatron_qwen/build_info.h"
#include "megatron_qwen/copy_bandwidth.h"

namespace py = pybind11;

namespace megatron_qwen {
namespace {

py::dict build_info_dict() {
  const BuildInfo info = build_info();
  py::dict result;
  result["version"] = info.version;
  result["cxx_compiler"] = info.cxx_compiler;
  result["cuda_compiler"] = info.cuda_compiler;
  result["cuda_architectures"] = info.cuda_architectures;
  result["cuda_compiled"] = info.cuda_compiled;
  return result;
}

void copy_bandwidth_addresses(std::uintptr_t destination, std::uintptr_t source, std::int64_t num_bytes,
                              std::uintptr_t stream, std::int64_t num_blocks) {
  const CopyBandwidthParams params{reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source),
                                   num_bytes, num_blocks, reinterpret_cast<void*>(stream)};
#if MEGATRON_QWEN_WITH_CUDA
  copy_bandwidth(params);
#else
  check(params);
  throw std::runtime_error(
      "copy_bandwidth: megatron_qwen._C was built without CUDA kernels; reinstall where nvcc is, with "
      "MEGATRON_QWEN_CUDA=on");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of megatron_qwen. Imports without a GPU.";
  module.def("build_info", &build_info_dict, "Version, compilers and CUDA architectures this module was built with.");
  module.def("copy_bandwidth", &copy_bandwidth_addresses, py::arg("destination"), py::arg("source"),
             py::arg("num_bytes"), py::arg("stream") = 0, py::kw_only(), py::arg("num_blocks") = 0,
             "Enqueue one streaming device-to-device copy (16-byte accesses) on `stream`.");
}

}  // namespace megatron_qwen
