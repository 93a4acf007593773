#include "megatron_qwen/attention_backward.h"

#include "attention.h"

namespace py = pybind11;

namespace megatron_qwen {
namespace {

using namespace attention_arguments;
// Batch, rows, heads, head_dim.
using Shape = std::tuple<Size, Size, Size, Size>;
// The rotated queries, addresses of exponents and of deltas.
using Rows = std::tuple<Heads, Address, Address>;

AttentionBackwardInputs inputs_of(const char* op, const Problem& problem, const Rows& rows, const Heads& k,
                                  const Heads& v, const Heads& grad, const std::string& dtype, Address stream) {
  const auto& [queries, exponents, deltas] = rows;
  return {problem_of(op, problem, dtype, stream),
          heads_of(queries),
          heads_of(k),
          heads_of(v),
          heads_of(grad),
          at<const float>(exponents),
          at<const float>(deltas)};
}

void enqueue_rotate(const Heads& x, const Shape& shape, Address positions, Size start, const Tables& tables,
                    const Chunks& chunks, Size copies, Address out, const std::string& dtype, Address stream) {
  const auto& [batch, rows, heads, head_dim] = shape;
  attention_rotate({heads_of(x), batch, rows, heads, head_dim, at<const std::int32_t>(positions), start,
                    tables_of(tables), chunks_of(chunks), copies, at<void>(out),
                    parse_dtype("attention_rotate", "dtype", dtype), at<void>(stream)});
}

void enqueue_row_terms(const Heads& grad, const Heads& output, const Shape& shape, Address lse, Address exponents,
                       Address deltas, const std::string& dtype, Address stream) {
  const auto& [batch, rows, heads, head_dim] = shape;
  attention_row_terms({heads_of(grad), heads_of(output), batch, rows, heads, head_dim, at<const float>(lse),
                       at<float>(exponents), at<float>(deltas), parse_dtype("attention_row_terms", "dtype", dtype),
                       at<void>(stream)});
}

void enqueue_keys(const Problem& problem, const Rows& rows, const Heads& k, const Heads& v, const Heads& grad,
                  bool turns_back, Address dk, Address dv, const std::string& dtype, Address stream) {
  attention_keys_backward({inputs_of("attention_keys_backward", problem, rows, k, v, grad, dtype, stream), turns_back,
                           at<void>(dk), at<void>(dv)});
}

void enqueue_queries(const Problem& problem, const Rows& rows, const Heads& k, const Heads& v, const Heads& grad,
                     Address dq, const std::string& dtype, Address stream) {
  attention_queries_backward(
      {inputs_of("attention_queries_backward", problem, rows, k, v, grad, dtype, stream), at<void>(dq)});
}

}  // namespace

void register_attention_backward(py::module_& module) {
  module.def(
      "attention_rotate", &enqueue_rotate, py::kw_only(), py::arg("x"), py::arg("shape"), py::arg("positions"),
      py::arg("start"), py::arg("tables"), py::arg("chunks"), py::arg("copies"), py::arg("out"), py::arg("dtype"),
      py::arg("stream") = 0,
      "Enqueue out [copies, B, S, H, D]: heads rotated as each segment of keys, or their own chunk, wants them.");
  module.def("attention_row_terms", &enqueue_row_terms, py::kw_only(), py::arg("grad"), py::arg("output"),
             py::arg("shape"), py::arg("lse"), py::arg("exponents"), py::arg("deltas"), py::arg("dtype"),
             py::arg("stream") = 0, "Enqueue log2(e) lse and the sum of grad output, [B, H, S] of each row.");
  module.def("attention_keys_backward", &enqueue_keys, py::kw_only(), py::arg("problem"), py::arg("rows"), py::arg("k"),
             py::arg("v"), py::arg("grad"), py::arg("turns_back"), py::arg("dk"), py::arg("dv"), py::arg("dtype"),
             py::arg("stream") = 0, "Enqueue the gradients of keys and values.");
  module.def("attention_queries_backward", &enqueue_queries, py::kw_only(), py::arg("problem"), py::arg("rows"),
             py::arg("k"), py::arg("v"), py::arg("grad"), py::arg("dq"), py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue the gradient of queries.");
}

}  // namespace megatron_qwen
