#include "megatron_qwen/swiglu.h"

#include "bindings.h"

namespace py = pybind11;

namespace megatron_qwen {

void register_swiglu(py::module_& module) {
  module.def(
      "swiglu_forward",
      [](std::uintptr_t packed, std::uintptr_t out, std::int64_t rows, std::int64_t width, std::int64_t packed_stride,
         const std::string& dtype, std::uintptr_t stream) {
        swiglu_forward({at<const void>(packed), at<void>(out), rows, width, packed_stride,
                        parse_dtype("swiglu_forward", "dtype", dtype), at<void>(stream)});
      },
      py::kw_only(), py::arg("packed"), py::arg("out"), py::arg("rows"), py::arg("width"), py::arg("packed_stride"),
      py::arg("dtype"), py::arg("stream") = 0,
      "Enqueue out [rows, width] = silu(gate) * up of packed [rows, 2 width].");
  module.def(
      "swiglu_backward",
      [](std::uintptr_t grad, std::uintptr_t packed, std::uintptr_t grad_packed, std::int64_t rows, std::int64_t width,
         std::int64_t grad_stride, std::int64_t packed_stride, const std::string& dtype, std::uintptr_t stream) {
        swiglu_backward({at<const void>(grad), at<const void>(packed), at<void>(grad_packed), rows, width, grad_stride,
                         packed_stride, parse_dtype("swiglu_backward", "dtype", dtype), at<void>(stream)});
      },
      py::kw_only(), py::arg("grad"), py::arg("packed"), py::arg("grad_packed"), py::arg("rows"), py::arg("width"),
      py::arg("grad_stride"), py::arg("packed_stride"), py::arg("dtype"), py::arg("stream") = 0,
      "Enqueue the gradient of packed [rows, 2 width] from that of out [rows, width].");
}

}  // namespace megatron_qwen
