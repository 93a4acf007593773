#include "attention.h"

namespace py = pybind11;

namespace megatron_qwen {
namespace {

void enqueue_forward(const attention_arguments::Problem& problem, const attention_arguments::Heads& q,
                     const attention_arguments::Heads& k, const attention_arguments::Heads& v, std::uintptr_t out,
                     std::uintptr_t lse, const std::string& dtype, std::uintptr_t stream) {
  attention_forward({attention_arguments::problem_of("attention_forward", problem, dtype, stream),
                     attention_arguments::heads_of(q), attention_arguments::heads_of(k),
                     attention_arguments::heads_of(v), at<void>(out), at<float>(lse)});
}

}  // namespace

void register_attention_forward(py::module_& module) {
  module.def("attention_forward", &enqueue_forward, py::kw_only(), py::arg("problem"), py::arg("q"), py::arg("k"),
             py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue out and lse of Dual Chunk Attention, or of plain causal attention; k comes rotated.");
  module.attr("attention_tile_rows") = kAttentionTileRows;
}

}  // namespace megatron_qwen
