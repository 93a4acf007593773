#include "megatron_qwen/column_sum.h"

#include "bindings.h"

namespace py = pybind11;

namespace megatron_qwen {

void register_column_sum(py::module_& module) {
  module.def(
      "column_sum",
      [](std::uintptr_t partial, std::uintptr_t out, std::int64_t rows, std::int64_t columns, const std::string& dtype,
         std::uintptr_t stream) {
        column_sum({at<const float>(partial), at<void>(out), rows, columns, parse_dtype("column_sum", "dtype", dtype),
                    at<void>(stream)});
      },
      py::kw_only(), py::arg("partial"), py::arg("out"), py::arg("rows"), py::arg("columns"), py::arg("dtype"),
      py::arg("stream") = 0,
      "Enqueue the sums of the columns of partial [rows, columns], contiguous fp32, in a fixed order.");
}

}  // namespace megatron_qwen
