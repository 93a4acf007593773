"""Layer specifications of Qwen models, for `build_model` and for `--spec` of an unmodified Megatron-LM.

`--spec megatron_qwen.model.spec get_qwen_layer_spec` serves launchers that call the attribute with a
configuration (megatron-core 0.19, Megatron-Bridge), `--spec megatron_qwen.model.spec QWEN_LAYER_SPEC`
those that use it as it is. Importing this module changes nothing in torch or Megatron-Core.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.attention import CoreAttention
from megatron_qwen.model.dual_chunk import dual_chunk_of
from megatron_qwen.model.experts import LocalExperts
from megatron_qwen.model.layer import ResidualNormLayer
from megatron_qwen.model.moe import QwenMoELayer
from megatron_qwen.model.norm import RMSNorm
from megatron_qwen.model.router import QwenRouter
from megatron_qwen.model.self_attention import QwenSelfAttention
from megatron_qwen.model.swiglu import SwiGLU
from megatron_qwen.model.transformer_config import transformer_engine_by_default

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "local", "te")


class QwenLocalSpecProvider(LocalSpecProvider):  # type: ignore[misc]  # megatron-core is untyped
    """Megatron's local modules with our norm, core attention, activation and routed experts."""

    def layer_norm(self, *_: Any, **__: Any) -> type:
        """Return the norm of layers and of the block's end."""
        return RMSNorm

    def core_attention(self) -> type:
        """Return the core attention."""
        return CoreAttention

    def activation_func(self) -> type:
        """Return the activation of MLPs, taken where the configuration's use_te_activation_func is on."""
        return SwiGLU

    def grouped_mlp_modules(self, *_: Any) -> Any:
        """Return the routed experts."""
        submodules = MLPSubmodules(
            linear_fc1=self.column_parallel_linear(),
            linear_fc2=self.row_parallel_linear(),
            activation_func=self.activation_func(),
        )
        return compat.experts_of_a_layer(LocalExperts, submodules)


def resolve_backend(backend: str, config: TransformerConfig | None = None) -> str:
    """Return "te" or "local" for "auto", "te" or "local".

    "auto" is Transformer Engine where it is installed and CUDA is there, unless the configuration's
    transformer_impl says "local".

    Raises:
        ConfigError: an unknown name, or "te" without Transformer Engine.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend: got {backend!r}, expected one of {BACKENDS}")
    if backend == "auto":
        wants_local = config is not None and config.transformer_impl == "local"
        return "te" if transformer_engine_by_default() and not wants_local else "local"
    if backend == "te" and not compat.has_transformer_engine():
        raise ConfigError(
            "backend 'te' needs Transformer Engine, which is not installed; run "
            "`pip install --no-build-isolation transformer-engine[pytorch]` on a CUDA machine, or use backend 'local'"
        )
    return backend


def layer_spec(*, backend: str, num_experts: int | None = None, grouped_gemm: bool = True) -> ModuleSpec:
    """Return the specification of one layer; dense if num_experts is None.

    Args:
        backend: "local" or "te".
        num_experts: experts of a MoE layer.
        grouped_gemm: compute the experts of a MoE layer as one grouped GEMM; "local" always does.
    """
    if backend == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None and grouped_gemm
        )
    provider = QwenLocalSpecProvider()
    mlp = get_mlp_module_spec_for_backend(
        backend=provider, num_experts=num_experts, moe_grouped_gemm=False, use_te_activation_func=True
    )
    if num_experts is not None:
        mlp = compat.moe_of_a_layer(QwenMoELayer, QwenRouter, mlp)
    attention = SelfAttentionSubmodules(
        linear_qkv=provider.column_parallel_linear(),
        core_attention=provider.core_attention(),
        linear_proj=provider.row_parallel_linear(),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=provider.layer_norm(),
        self_attention=ModuleSpec(
            QwenSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=provider.layer_norm(),
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
        # The same names in a distributed checkpoint as from the TE layers, which fuse norm and projection. A MoE
        # layer's second norm is a module of its own there too.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            **({} if num_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
        },
    )
    return ModuleSpec(ResidualNormLayer, submodules=submodules)


def moe_layer_pattern(config: TransformerConfig) -> list[bool]:
    """Return for each decoder layer of the whole model whether it is a MoE layer, by Megatron's moe_layer_freq."""
    if not config.num_moe_experts:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [i % config.moe_layer_freq == 0 for i in range(config.num_layers)]
    pattern = [bool(each) for each in config.moe_layer_freq]
    if len(pattern) != config.num_layers:
        raise ConfigError(f"moe_layer_freq has {len(pattern)} entries for {config.num_layers} layers")
    return pattern


def block_spec(
    config: TransformerConfig, *, backend: str = "auto", vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline rank's (virtual) stage, and the final norm.

    Args:
        config: Megatron's configuration of the whole model.
        backend: "auto", "te" or "local".
        vp_stage: virtual stage; None without interleaving.
        pp_rank: pipeline rank; this process's if None.

    Raises:
        ConfigError: see `resolve_backend`.
    """
    backend = resolve_backend(backend, config)
    dual = dual_chunk_of(config)
    if backend == "te" and dual is not None:
        logger.warning(
            "backend 'te' has no Dual Chunk Attention: attention is plain, which differs beyond %d tokens; backend "
            "'local' has it",
            dual.chunks.stride,
        )
    kinds = {
        is_moe: layer_spec(
            backend=backend,
            num_experts=config.num_moe_experts if is_moe else None,
            grouped_gemm=config.moe_grouped_gemm,
        )
        for is_moe in set(moe_layer_pattern(config))
    }
    specs = [kinds[is_moe] for is_moe in moe_layer_pattern(config)]
    return TransformerBlockSubmodules(
        layer_specs=[specs[i] for i in _layers_of_stage(config, vp_stage, pp_rank)], layer_norm=_final_norm(backend)
    )


def _layers_of_stage(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return list(layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank))
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)))


def _final_norm(backend: str) -> type:
    if backend == "local":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm  # type: ignore[no-any-return]


def get_qwen_layer_spec(
    config: Any = None,
    *args: Any,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    backend: str = "auto",
    **_: Any,
) -> TransformerBlockSubmodules | ModuleSpec:
    """Return the layer specification of a Qwen model, dense, MoE or mixed.

    Whatever launcher calls it: with a TransformerConfig, with a GPTModelConfig or model provider (which
    is a TransformerConfig or carries one as `transformer`), or as (args, config, vp_stage).

    Args:
        config: see above; None returns `QWEN_LAYER_SPEC`, which finds out when the layers are built.
        args: (config, vp_stage) after Megatron-LM's arguments.
        vp_stage: virtual pipeline stage.
        pp_rank: pipeline rank; this process's if None.
        backend: "auto", "te" or "local".

    Raises:
        ConfigError: no TransformerConfig among the arguments, or see `resolve_backend`.
    """
    if config is None and not args:
        return QWEN_LAYER_SPEC
    candidates = [config, *args, getattr(config, "transformer", None), getattr(config, "config", None)]
    found = next((each for each in candidates if isinstance(each, TransformerConfig)), None)
    if found is None:
        raise ConfigError(
            f"get_qwen_layer_spec: no TransformerConfig among {[type(each).__name__ for each in (config, *args)]}; "
            "pass one, or use QWEN_LAYER_SPEC"
        )
    if vp_stage is None:
        vp_stage = next((each for each in args if isinstance(each, int) and not isinstance(each, bool)), None)
    return block_spec(found, backend=backend, vp_stage=vp_stage, pp_rank=pp_rank)


class QwenTransformerLayer(ResidualNormLayer):
    """A layer that chooses its modules when it is built: dense or MoE, local or Transformer Engine.

    With it one ready-made specification serves every Qwen model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules | None = None,
        layer_number: int = 1,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Build layer `layer_number` (counted from 1 within its stage) of the model `config` describes."""
        del submodules  # Megatron passes the empty ones of QWEN_LAYER_SPEC
        number = layer_number + get_transformer_layer_offset(config, vp_stage)
        spec = _cached_layer_spec(
            resolve_backend("auto", config),
            config.num_moe_experts if moe_layer_pattern(config)[number - 1] else None,
            config.moe_grouped_gemm,
        )
        super().__init__(
            config=config, submodules=spec.submodules, layer_number=layer_number, vp_stage=vp_stage, **kwargs
        )


@functools.cache
def _cached_layer_spec(backend: str, num_experts: int | None, grouped_gemm: bool) -> ModuleSpec:
    return layer_spec(backend=backend, num_experts=num_experts, grouped_gemm=grouped_gemm)


QWEN_LAYER_SPEC = ModuleSpec(QwenTransformerLayer, submodules=TransformerLayerSubmodules())
"""A specification that needs no call, for dense, MoE and mixed models.

Megatron adds its own final norm to it: with sequence parallelism and without Transformer Engine use
`get_qwen_layer_spec`, because that norm (`WrappedTorchNorm`) refuses sequence parallelism.
"""
