#include "megatron_qwen/qkv_rope.h"

#include <string>
#include <tuple>

#include "bindings.h"

namespace py = pybind11;

namespace megatron_qwen {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
using Heads = std::tuple<Address, Size, Size, Size>;      // address; strides of sequence, batch and heads
using Tables = std::tuple<Address, Address, Size, Size>;  // cos, sin, rows, half
using Positions = std::tuple<Address, Size, Size>;        // address, bytes of one, tokens per position
using Layout = std::tuple<Size, Size, Size>;              // groups, queries per group, head_dim

StridedHeads heads_of(const Heads& heads) {
  const auto& [data, sequence, batch, head] = heads;
  return {at<void>(data), sequence, batch, head};
}

RopeTables tables_of(const Tables& tables, const Positions& positions) {
  const auto& [cos, sin, rows, half] = tables;
  const auto& [data, bytes, tokens_per_position] = positions;
  return {at<const float>(cos), at<const float>(sin), at<const void>(data), bytes, tokens_per_position, rows, half};
}

QkvLayout layout_of(const Layout& layout) {
  const auto& [groups, queries, head_dim] = layout;
  return {groups, queries, head_dim};
}

void enqueue_qkv_rope_forward(Address packed, Address bias, Address q, Address k, Address v, const Tables& tables,
                              const Positions& positions, const Layout& layout, Size tokens, Size packed_stride,
                              const std::string& dtype, const std::string& bias_dtype, Address stream) {
  constexpr const char* kOp = "qkv_rope_forward";
  qkv_rope_forward({at<const void>(packed), at<const void>(bias), at<void>(q), at<void>(k), at<void>(v),
                    tables_of(tables, positions), layout_of(layout), tokens, packed_stride,
                    parse_dtype(kOp, "dtype", dtype), parse_dtype(kOp, "bias_dtype", bias_dtype), at<void>(stream)});
}

void enqueue_qkv_rope_backward(const Heads& grad_q, const Heads& grad_k, const Heads& grad_v, Address grad_packed,
                               Address grad_bias, Address partial, const Tables& tables, const Positions& positions,
                               const Layout& layout, Size tokens, Size batch, Size num_programs,
                               const std::string& dtype, const std::string& bias_dtype, Address stream) {
  constexpr const char* kOp = "qkv_rope_backward";
  qkv_rope_backward({heads_of(grad_q), heads_of(grad_k), heads_of(grad_v), at<void>(grad_packed), at<void>(grad_bias),
                     at<float>(partial), tables_of(tables, positions), layout_of(layout), tokens, batch, num_programs,
                     parse_dtype(kOp, "dtype", dtype), parse_dtype(kOp, "bias_dtype", bias_dtype), at<void>(stream)});
}

void enqueue_rope(const Heads& q, const Heads& k, const Tables& tables, const Positions& positions, Size q_heads,
                  Size k_heads, Size head_dim, Size tokens, Size batch, bool inverse, const std::string& dtype,
                  Address stream) {
  rope({heads_of(q), heads_of(k), tables_of(tables, positions), q_heads, k_heads, head_dim, tokens, batch, inverse,
        parse_dtype("rope", "dtype", dtype), at<void>(stream)});
}

Size qkv_rope_programs(const Layout& layout, Size half, Size tokens, const std::string& dtype) {
  return qkv_rope_backward_programs(layout_of(layout), half, tokens,
                                    parse_dtype("qkv_rope_backward_programs", "dtype", dtype));
}

}  // namespace

void register_qkv_rope(py::module_& module) {
  module.def("qkv_rope_forward", &enqueue_qkv_rope_forward, py::kw_only(), py::arg("packed"), py::arg("bias"),
             py::arg("q"), py::arg("k"), py::arg("v"), py::arg("tables"), py::arg("positions"), py::arg("layout"),
             py::arg("tokens"), py::arg("packed_stride"), py::arg("dtype"), py::arg("bias_dtype"),
             py::arg("stream") = 0,
             "Enqueue q, k and v, contiguous, from packed [tokens, row]: bias, rotation and split.");
  module.def(
      "qkv_rope_backward", &enqueue_qkv_rope_backward, py::kw_only(), py::arg("grad_q"), py::arg("grad_k"),
      py::arg("grad_v"), py::arg("grad_packed"), py::arg("grad_bias"), py::arg("partial"), py::arg("tables"),
      py::arg("positions"), py::arg("layout"), py::arg("tokens"), py::arg("batch"), py::arg("num_programs"),
      py::arg("dtype"), py::arg("bias_dtype"), py::arg("stream") = 0,
      "Enqueue grad_packed [tokens, row] and grad_bias [row]; partial [num_programs, row] is fp32 scratch memory.");
  module.def("qkv_rope_backward_programs", &qkv_rope_programs, py::kw_only(), py::arg("layout"), py::arg("half"),
             py::arg("tokens"), py::arg("dtype"), "The num_programs for the current device: rows of partial sums.");
  module.def("rope", &enqueue_rope, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("tables"), py::arg("positions"),
             py::arg("q_heads"), py::arg("k_heads"), py::arg("head_dim"), py::arg("tokens"), py::arg("batch"),
             py::arg("inverse"), py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue the rotation of q and k in place, by the opposite angle if inverse.");
}

}  // namespace megatron_qwen
