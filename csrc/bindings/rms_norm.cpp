#include "megatron_qwen/rms_norm.h"

#include "bindings.h"

namespace py = pybind11;

namespace megatron_qwen {
namespace {

void enqueue_rms_norm_forward(std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t y,
                              std::uintptr_t sum, std::uintptr_t inverse_rms, std::int64_t rows, std::int64_t hidden,
                              std::int64_t x_stride, std::int64_t residual_stride, float eps, const std::string& dtype,
                              const std::string& weight_dtype, std::uintptr_t stream) {
  constexpr const char* kOp = "rms_norm_forward";
  rms_norm_forward({at<const void>(x), at<const void>(residual), at<const void>(weight), at<void>(y), at<void>(sum),
                    at<float>(inverse_rms), rows, hidden, x_stride, residual_stride, eps,
                    parse_dtype(kOp, "dtype", dtype), parse_dtype(kOp, "weight_dtype", weight_dtype),
                    at<void>(stream)});
}

void enqueue_rms_norm_backward(std::uintptr_t grad, std::uintptr_t grad_sum, std::uintptr_t x, std::uintptr_t weight,
                               std::uintptr_t inverse_rms, std::uintptr_t grad_x, std::uintptr_t grad_weight,
                               std::uintptr_t partial, std::int64_t rows, std::int64_t hidden, std::int64_t x_stride,
                               std::int64_t num_programs, const std::string& dtype, const std::string& weight_dtype,
                               std::uintptr_t stream) {
  constexpr const char* kOp = "rms_norm_backward";
  rms_norm_backward({at<const void>(grad), at<const void>(grad_sum), at<const void>(x), at<const void>(weight),
                     at<const float>(inverse_rms), at<void>(grad_x), at<void>(grad_weight), at<float>(partial), rows,
                     hidden, x_stride, num_programs, parse_dtype(kOp, "dtype", dtype),
                     parse_dtype(kOp, "weight_dtype", weight_dtype), at<void>(stream)});
}

std::int64_t rms_norm_programs(std::int64_t rows, std::int64_t hidden, const std::string& dtype, bool adds) {
  return rms_norm_backward_programs(rows, hidden, parse_dtype("rms_norm_backward_programs", "dtype", dtype), adds);
}

}  // namespace

void register_rms_norm(py::module_& module) {
  module.def("rms_norm_forward", &enqueue_rms_norm_forward, py::kw_only(), py::arg("x"), py::arg("residual"),
             py::arg("weight"), py::arg("y"), py::arg("sum"), py::arg("inverse_rms"), py::arg("rows"),
             py::arg("hidden"), py::arg("x_stride"), py::arg("residual_stride"), py::arg("eps"), py::arg("dtype"),
             py::arg("weight_dtype"), py::arg("stream") = 0,
             "Enqueue y [rows, hidden], inverse_rms [rows] and, with a residual, sum = x + residual.");
  module.def("rms_norm_backward_programs", &rms_norm_programs, py::kw_only(), py::arg("rows"), py::arg("hidden"),
             py::arg("dtype"), py::arg("adds"), "The num_programs for the current device: rows of partial sums.");
  module.def("rms_norm_backward", &enqueue_rms_norm_backward, py::kw_only(), py::arg("grad"), py::arg("grad_sum"),
             py::arg("x"), py::arg("weight"), py::arg("inverse_rms"), py::arg("grad_x"), py::arg("grad_weight"),
             py::arg("partial"), py::arg("rows"), py::arg("hidden"), py::arg("x_stride"), py::arg("num_programs"),
             py::arg("dtype"), py::arg("weight_dtype"), py::arg("stream") = 0,
             "Enqueue grad_x and grad_weight; partial [num_programs, hidden] is fp32 scratch memory.");
}

}  // namespace megatron_qwen
