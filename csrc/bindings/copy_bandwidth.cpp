#include "megatron_qwen/copy_bandwidth.h"

#include "bindings.h"

namespace py = pybind11;

namespace megatron_qwen {

void register_copy_bandwidth(py::module_& module) {
  module.def(
      "copy_bandwidth",
      [](std::uintptr_t destination, std::uintptr_t source, std::int64_t num_bytes, std::uintptr_t stream,
         std::int64_t num_blocks) {
        copy_bandwidth({at<void>(destination), at<const void>(source), num_bytes, num_blocks, at<void>(stream)});
      },
      py::arg("destination"), py::arg("source"), py::arg("num_bytes"), py::arg("stream") = 0, py::kw_only(),
      py::arg("num_blocks") = 0, "Enqueue one streaming device-to-device copy (16-byte accesses) on `stream`.");
}

}  // namespace megatron_qwen
