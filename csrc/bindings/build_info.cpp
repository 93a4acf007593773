#include "megatron_qwen/build_info.h"

#include <pybind11/stl.h>

#include "bindings.h"

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

}  // namespace

void register_build_info(py::module_& module) {
  module.def("build_info", &build_info_dict, "Version, compilers and CUDA architectures this module was built with.");
}

}  // namespace megatron_qwen
