// megatron_qwen._C. The types of its functions are in megatron_qwen/_C.pyi.
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of megatron_qwen. Imports without a GPU.";
  megatron_qwen::register_attention_backward(module);
  megatron_qwen::register_attention_forward(module);
  megatron_qwen::register_build_info(module);
  megatron_qwen::register_column_sum(module);
  megatron_qwen::register_copy_bandwidth(module);
  megatron_qwen::register_grouped_mlp(module);
  megatron_qwen::register_moe_rows(module);
  megatron_qwen::register_qkv_rope(module);
  megatron_qwen::register_rms_norm(module);
  megatron_qwen::register_swiglu(module);
}
