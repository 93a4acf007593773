// The launchers of a build without CUDA: they check their parameters as ever and then say what is missing.
#include <stdexcept>
#include <string>

#include "megatron_qwen/attention.h"
#include "megatron_qwen/attention_backward.h"
#include "megatron_qwen/column_sum.h"
#include "megatron_qwen/copy_bandwidth.h"
#include "megatron_qwen/grouped_mlp.h"
#include "megatron_qwen/moe_rows.h"
#include "megatron_qwen/qkv_rope.h"
#include "megatron_qwen/rms_norm.h"
#include "megatron_qwen/swiglu.h"

namespace megatron_qwen {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw std::runtime_error(std::string(op) +
                           ": megatron_qwen._C was built without CUDA kernels; reinstall where nvcc is, with "
                           "MEGATRON_QWEN_CUDA=on");
}

template <typename Params>
[[noreturn]] void refuse(const char* op, const Params& params) {
  check(params);
  refuse(op);
}

}  // namespace

void attention_rotate(const AttentionRotateParams& params) { refuse("attention_rotate", params); }
void attention_row_terms(const AttentionRowTermsParams& params) { refuse("attention_row_terms", params); }
void attention_keys_backward(const AttentionKeysBackwardParams& params) { refuse("attention_keys_backward", params); }
void attention_queries_backward(const AttentionQueriesBackwardParams& params) {
  refuse("attention_queries_backward", params);
}
void attention_forward(const AttentionForwardParams& params) { refuse("attention_forward", params); }
void column_sum(const ColumnSumParams& params) { refuse("column_sum", params); }
void copy_bandwidth(const CopyBandwidthParams& params) { refuse("copy_bandwidth", params); }
void rms_norm_forward(const RMSNormForwardParams& params) { refuse("rms_norm_forward", params); }
void rms_norm_backward(const RMSNormBackwardParams& params) { refuse("rms_norm_backward", params); }
std::int64_t rms_norm_backward_programs(std::int64_t, std::int64_t, DType, bool) {
  refuse("rms_norm_backward_programs");
}
void swiglu_forward(const SwiGLUForwardParams& params) { refuse("swiglu_forward", params); }
void swiglu_backward(const SwiGLUBackwardParams& params) { refuse("swiglu_backward", params); }
void grouped_up(const GroupedUpParams& params) { refuse("grouped_up", params); }
void grouped_down(const GroupedDownParams& params) { refuse("grouped_down", params); }
void grouped_activation_backward(const GroupedActivationBackwardParams& params) {
  refuse("grouped_activation_backward", params);
}
void grouped_weight_gradient(const GroupedWeightGradientParams& params) { refuse("grouped_weight_gradient", params); }
std::int64_t activation_backward_columns(std::int64_t) { refuse("activation_backward_columns"); }
void moe_row_map(const MoeRowMapParams& params) { refuse("moe_row_map", params); }
void moe_combine(const MoeCombineParams& params) { refuse("moe_combine", params); }
void moe_gate(const MoeGateParams& params) { refuse("moe_gate", params); }
void moe_gate_gradient(const MoeGateGradientParams& params) { refuse("moe_gate_gradient", params); }
std::int64_t moe_gate_gradient_programs(std::int64_t, std::int64_t) { refuse("moe_gate_gradient_programs"); }
void qkv_rope_forward(const QkvRopeForwardParams& params) { refuse("qkv_rope_forward", params); }
void qkv_rope_backward(const QkvRopeBackwardParams& params) { refuse("qkv_rope_backward", params); }
void rope(const RopeParams& params) { refuse("rope", params); }

std::int64_t qkv_rope_backward_programs(const QkvLayout&, std::int64_t, std::int64_t, DType) {
  refuse("qkv_rope_backward_programs");
}

}  // namespace megatron_qwen
