#include "megatron_qwen/moe_rows.h"

#include "bindings.h"

namespace py = pybind11;

namespace megatron_qwen {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

void enqueue_row_map(Address source, Address weights, Address gates, Address tokens, Address row_weights, Size routed,
                     Size shared_tokens, Size topk, Address stream) {
  moe_row_map({at<const std::int64_t>(source), at<const float>(weights), at<const float>(gates),
               at<std::int32_t>(tokens), at<float>(row_weights), routed, shared_tokens, topk, at<void>(stream)});
}

void enqueue_combine(Address rows, Address positions, Address shared, Address scale, Address vector, Address out,
                     Size tokens, Size size, Size topk, const std::string& dtype, Address stream) {
  moe_combine({at<const void>(rows), at<const std::int64_t>(positions), at<const void>(shared), at<const float>(scale),
               at<const void>(vector), at<void>(out), tokens, size, topk, parse_dtype("moe_combine", "dtype", dtype),
               at<void>(stream)});
}

void enqueue_gate(Address x, Address vector, Address out, Size tokens, Size size, const std::string& dtype,
                  Address stream) {
  moe_gate({at<const void>(x), at<const void>(vector), at<float>(out), tokens, size,
            parse_dtype("moe_gate", "dtype", dtype), at<void>(stream)});
}

void enqueue_gate_gradient(Address scale, Address x, Address partial, Size tokens, Size size, Size programs,
                           const std::string& dtype, Address stream) {
  moe_gate_gradient({at<const float>(scale), at<const void>(x), at<float>(partial), tokens, size, programs,
                     parse_dtype("moe_gate_gradient", "dtype", dtype), at<void>(stream)});
}

}  // namespace

void register_moe_rows(py::module_& module) {
  module.def("moe_row_map", &enqueue_row_map, py::kw_only(), py::arg("source"), py::arg("weights"), py::arg("gates"),
             py::arg("tokens"), py::arg("row_weights"), py::arg("routed"), py::arg("shared_tokens"), py::arg("topk"),
             py::arg("stream") = 0, "Enqueue token and weight of each row in expert order.");
  module.def("moe_combine", &enqueue_combine, py::kw_only(), py::arg("rows"), py::arg("positions"), py::arg("shared"),
             py::arg("scale"), py::arg("vector"), py::arg("out"), py::arg("tokens"), py::arg("size"), py::arg("topk"),
             py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue out [T, H]: the sum of each token's rows, of shared, and of scale times vector.");
  module.def("moe_gate", &enqueue_gate, py::kw_only(), py::arg("x"), py::arg("vector"), py::arg("out"),
             py::arg("tokens"), py::arg("size"), py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue out [T] = sigmoid(x vector).");
  module.def("moe_gate_gradient_programs", &moe_gate_gradient_programs, py::kw_only(), py::arg("tokens"),
             py::arg("size"), "The programs for the current device: rows of partial sums.");
  module.def("moe_gate_gradient", &enqueue_gate_gradient, py::kw_only(), py::arg("scale"), py::arg("x"),
             py::arg("partial"), py::arg("tokens"), py::arg("size"), py::arg("programs"), py::arg("dtype"),
             py::arg("stream") = 0, "Enqueue partial [programs, H]: sums of scale [T] times x [T, H].");
}

}  // namespace megatron_qwen
