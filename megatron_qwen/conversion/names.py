"""The table: Hugging Face name <-> Megatron name <-> transform <-> shard axis, one row per parameter family.

Both directions of every conversion follow from these rows; `parameters.py` fills in the numbers of a model.

Megatron has three names for a parameter, all in the row:
- in a model of the local spec (`megatron`),
- in a model of the Transformer Engine spec, where norms are fused into the linear layer behind them (`engine`),
- in a `torch_dist` checkpoint (`stored`), the same for both specs but for the norm in front of a MoE layer. There
  the layers of a homogeneous model are stacked: `decoder.layers.mlp.linear_fc2.weight` [layers, ...], experts
  likewise; a model that mixes dense and MoE layers keeps `decoder.layers.7.mlp...`.
Read off the `sharded_state_dict` of megatron-core 0.16.1 and 0.19.2, which agree.

Shapes are written in symbols: V vocabulary rows, h hidden, q query rows, kv key or value rows, qkv their sum, f dense
MLP width, e expert width, s shared-expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Scope = Literal["model", "layer", "dense", "moe"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row. Names of a layer's parameters are relative to the layer; `{expert}` stands for the expert's number.

    Attributes:
        scope: once per model, or once per layer / dense layer / MoE layer.
        hf: Hugging Face tensors, in the order the transform takes them.
        hf_shapes: their shapes in symbols.
        megatron: name in a local-spec model.
        engine: name in a Transformer Engine model; empty if the same.
        stored: name in a torch_dist checkpoint; empty if as `megatron`.
        shape: shape of Megatron's tensor in symbols.
        transform: key of `transforms.TRANSFORMS`.
        shard_axis: axis that tensor parallelism cuts; None if every rank holds all of it.
    """

    scope: Scope
    hf: tuple[str, ...]
    hf_shapes: tuple[str, ...]
    megatron: str
    engine: str = ""
    stored: str = ""
    shape: str
    transform: str = "keep"
    shard_axis: int | None = None

    @property
    def is_expert(self) -> bool:
        """Whether there is one such parameter per routed expert."""
        return "{expert}" in self.megatron


FAMILIES: tuple[Family, ...] = (
    Family(
        scope="model",
        hf=("model.embed_tokens.weight",),
        hf_shapes=("V h",),
        megatron="embedding.word_embeddings.weight",
        shape="V h",
        shard_axis=0,
    ),
    Family(
        scope="layer",
        hf=("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        hf_shapes=("q h", "kv h", "kv h"),
        megatron="self_attention.linear_qkv.weight",
        shape="qkv h",
        transform="qkv",
        shard_axis=0,
    ),
    Family(
        scope="layer",
        hf=("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        hf_shapes=("q", "kv", "kv"),
        megatron="self_attention.linear_qkv.bias",
        shape="qkv",
        transform="qkv",
        shard_axis=0,
    ),
    Family(
        scope="layer",
        hf=("self_attn.o_proj.weight",),
        hf_shapes=("h q",),
        megatron="self_attention.linear_proj.weight",
        shape="h q",
        shard_axis=1,
    ),
    Family(
        scope="dense",
        hf=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        hf_shapes=("f h", "f h"),
        megatron="mlp.linear_fc1.weight",
        shape="2f h",
        transform="gate_up",
        shard_axis=0,
    ),
    Family(
        scope="dense",
        hf=("mlp.down_proj.weight",),
        hf_shapes=("h f",),
        megatron="mlp.linear_fc2.weight",
        shape="h f",
        shard_axis=1,
    ),
    Family(
        scope="moe",
        hf=("mlp.gate.weight",),
        hf_shapes=("E h",),
        megatron="mlp.router.weight",
        shape="E h",
    ),
    Family(
        scope="moe",
        hf=("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        hf_shapes=("e h", "e h"),
        megatron="mlp.experts.local_experts.{expert}.linear_fc1.weight",
        engine="mlp.experts.linear_fc1.weight{expert}",
        stored="mlp.experts.experts.linear_fc1.weight",
        shape="2e h",
        transform="gate_up",
        shard_axis=0,
    ),
    Family(
        scope="moe",
        hf=("mlp.experts.{expert}.down_proj.weight",),
        hf_shapes=("h e",),
        megatron="mlp.experts.local_experts.{expert}.linear_fc2.weight",
        engine="mlp.experts.linear_fc2.weight{expert}",
        stored="mlp.experts.experts.linear_fc2.weight",
        shape="h e",
        shard_axis=1,
    ),
    Family(
        scope="moe",
        hf=("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        hf_shapes=("s h", "s h"),
        megatron="mlp.shared_experts.linear_fc1.weight",
        shape="2s h",
        transform="gate_up",
        shard_axis=0,
    ),
    Family(
        scope="moe",
        hf=("mlp.shared_expert.down_proj.weight",),
        hf_shapes=("h s",),
        megatron="mlp.shared_experts.linear_fc2.weight",
        shape="h s",
        shard_axis=1,
    ),
    Family(
        scope="moe",
        hf=("mlp.shared_expert_gate.weight",),
        hf_shapes=("1 h",),
        megatron="mlp.shared_experts.gate_weight",
        shape="1 h",
    ),
    Family(
        scope="layer",
        hf=("input_layernorm.weight",),
        hf_shapes=("h",),
        megatron="input_layernorm.weight",
        engine="self_attention.linear_qkv.layer_norm_weight",
        stored="self_attention.linear_qkv.layer_norm_weight",
        shape="h",
    ),
    Family(
        scope="dense",
        hf=("post_attention_layernorm.weight",),
        hf_shapes=("h",),
        megatron="pre_mlp_layernorm.weight",
        engine="mlp.linear_fc1.layer_norm_weight",
        stored="mlp.linear_fc1.layer_norm_weight",
        shape="h",
    ),
    # The local spec stores this norm under the name of a layer that a MoE block does not have; Transformer Engine's
    # keeps its own name. We write the former and read both.
    Family(
        scope="moe",
        hf=("post_attention_layernorm.weight",),
        hf_shapes=("h",),
        megatron="pre_mlp_layernorm.weight",
        stored="mlp.linear_fc1.layer_norm_weight",
        shape="h",
    ),
    Family(
        scope="model",
        hf=("model.norm.weight",),
        hf_shapes=("h",),
        megatron="decoder.final_layernorm.weight",
        shape="h",
    ),
    Family(
        scope="model",
        hf=("lm_head.weight",),
        hf_shapes=("V h",),
        megatron="output_layer.weight",
        shape="V h",
        shard_axis=0,
    ),
)

# Modules that carry a `_extra_state` object in the local spec, empty there; stock strict loading asks for it.
EXTRA_STATE_MODULES = frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"})

HF_LAYER = "model.layers.{layer}."
MEGATRON_LAYER = "decoder.layers.{layer}."
STACKED_LAYERS = "decoder.layers."
EMBEDDING_NAME = "model.embed_tokens.weight"
OUTPUT_NAME = "lm_head.weight"
VOCABULARY_AXIS = "V"

# Which field of config.json decides each symbol; for error messages.
SYMBOL_FIELDS: Mapping[str, str] = {
    "V": "vocab_size",
    "h": "hidden_size",
    "q": "num_attention_heads",
    "kv": "num_key_value_heads",
    "qkv": "num_attention_heads + 2 num_key_value_heads",
    "f": "intermediate_size",
    "2f": "intermediate_size",
    "e": "moe_intermediate_size",
    "2e": "moe_intermediate_size",
    "s": "shared_expert_intermediate_size",
    "2s": "shared_expert_intermediate_size",
    "E": "num_experts",
    "1": "none",
}
