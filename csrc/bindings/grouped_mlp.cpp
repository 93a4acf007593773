#include "megatron_qwen/grouped_mlp.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace megatron_qwen {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
using Addresses = std::vector<Address>;
// Addresses of offsets and tokens; experts, routed rows, shared tokens, rows of x; sizes H, F and Fs.
using Groups = std::tuple<Address, Address, Size, Size, Size, Size, Size, Size, Size>;

ExpertGroups groups_of(const char* op, const Groups& groups, const std::string& dtype, Address stream) {
  const auto& [offsets, tokens, experts, routed, shared_tokens, x_rows, size, width, shared_width] = groups;
  return {at<const std::int64_t>(offsets),
          at<const std::int32_t>(tokens),
          experts,
          routed,
          shared_tokens,
          x_rows,
          size,
          width,
          shared_width,
          parse_dtype(op, "dtype", dtype),
          at<void>(stream)};
}

// One matrix per group.
const void* const* matrices_of(const char* op, const char* name, const Addresses& matrices,
                               const ExpertGroups& groups) {
  const Size expected = groups.experts + (groups.shared_tokens != 0 ? 1 : 0);
  if (static_cast<Size>(matrices.size()) != expected) {
    throw std::invalid_argument(std::string(op) + ": got " + std::to_string(matrices.size()) + " " + name +
                                "; expected one per group, " + std::to_string(expected));
  }
  return reinterpret_cast<const void* const*>(matrices.data());
}

void enqueue_up(const Groups& groups, Address x, const Addresses& fc1, Address packed, Address hidden,
                const std::string& dtype, Address stream) {
  constexpr const char* kOp = "grouped_up";
  const ExpertGroups all = groups_of(kOp, groups, dtype, stream);
  grouped_up({all, at<const void>(x), matrices_of(kOp, "fc1", fc1, all), at<void>(packed), at<void>(hidden)});
}

void enqueue_down(const Groups& groups, Address a, const Addresses& matrices, Address row_weights, Address out,
                  Size factor, bool transposed, const std::string& dtype, Address stream) {
  constexpr const char* kOp = "grouped_down";
  const ExpertGroups all = groups_of(kOp, groups, dtype, stream);
  grouped_down({all, at<const void>(a), matrices_of(kOp, "matrices", matrices, all), at<const float>(row_weights),
                at<void>(out), factor, transposed});
}

void enqueue_activation_backward(const Groups& groups, Address grad, const Addresses& fc2, Address row_weights,
                                 Address slots, Address packed, Address grad_packed, Address hidden, Address partial,
                                 const std::string& dtype, Address stream) {
  constexpr const char* kOp = "grouped_activation_backward";
  const ExpertGroups all = groups_of(kOp, groups, dtype, stream);
  grouped_activation_backward({all, at<const void>(grad), matrices_of(kOp, "fc2", fc2, all),
                               at<const float>(row_weights), at<const std::int64_t>(slots), at<const void>(packed),
                               at<void>(grad_packed), at<void>(hidden), at<float>(partial)});
}

void enqueue_weight_gradient(const Groups& groups, Address flat, Address x, const Addresses& out, Size factor,
                             bool transposed, bool adds, const std::string& out_dtype, const std::string& dtype,
                             Address stream) {
  constexpr const char* kOp = "grouped_weight_gradient";
  const ExpertGroups all = groups_of(kOp, groups, dtype, stream);
  matrices_of(kOp, "out", out, all);
  grouped_weight_gradient({all, at<const void>(flat), at<const void>(x), reinterpret_cast<void* const*>(out.data()),
                           factor, transposed, adds, parse_dtype(kOp, "out_dtype", out_dtype)});
}

}  // namespace

void register_grouped_mlp(py::module_& module) {
  module.def("grouped_up", &enqueue_up, py::kw_only(), py::arg("groups"), py::arg("x"), py::arg("fc1"),
             py::arg("packed"), py::arg("hidden"), py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue packed = x W1^T of each group, and hidden = silu(gate) * up; 0 for one that is not wanted.");
  module.def("grouped_down", &enqueue_down, py::kw_only(), py::arg("groups"), py::arg("a"), py::arg("matrices"),
             py::arg("row_weights"), py::arg("out"), py::arg("factor"), py::arg("transposed"), py::arg("dtype"),
             py::arg("stream") = 0, "Enqueue out [R + T, H] = a W of each group, rows weighted.");
  module.def("grouped_activation_backward", &enqueue_activation_backward, py::kw_only(), py::arg("groups"),
             py::arg("grad"), py::arg("fc2"), py::arg("row_weights"), py::arg("slots"), py::arg("packed"),
             py::arg("grad_packed"), py::arg("hidden"), py::arg("partial"), py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue the gradient of packed, the weighted activation and partial sums of the weights' gradients.");
  module.def("grouped_weight_gradient", &enqueue_weight_gradient, py::kw_only(), py::arg("groups"), py::arg("flat"),
             py::arg("x"), py::arg("out"), py::arg("factor"), py::arg("transposed"), py::arg("adds"),
             py::arg("out_dtype"), py::arg("dtype"), py::arg("stream") = 0,
             "Enqueue flat^T x of each group, or x^T flat if transposed; added to out if adds.");
  module.def("activation_backward_columns", &activation_backward_columns, py::kw_only(), py::arg("width"),
             "Partial sums per row of grouped_activation_backward for an expert of this width.");
  module.attr("most_groups") = kMostGroups;
}

}  // namespace megatron_qwen
