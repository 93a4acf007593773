// Each operation has a file here that registers its functions; module.cpp calls them. Tensors arrive as addresses
// (tensor.data_ptr()), 0 for one that is not there; streams as torch.cuda.Stream.cuda_stream.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace megatron_qwen {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void register_attention_backward(pybind11::module_& module);
void register_attention_forward(pybind11::module_& module);
void register_build_info(pybind11::module_& module);
void register_column_sum(pybind11::module_& module);
void register_copy_bandwidth(pybind11::module_& module);
void register_grouped_mlp(pybind11::module_& module);
void register_moe_rows(pybind11::module_& module);
void register_qkv_rope(pybind11::module_& module);
void register_rms_norm(pybind11::module_& module);
void register_swiglu(pybind11::module_& module);

}  // namespace megatron_qwen
