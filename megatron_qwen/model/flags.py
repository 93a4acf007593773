"""The flags with which an unmodified Megatron-LM `pretrain_gpt.py` builds a Qwen model.

The arrays are those of Megatron-LM's own example scripts. Parsed by Megatron-LM's argument parser they give the
very `TransformerConfig` that `QwenConfig.to_transformer_config` makes for the same layout, dtype and
`LaunchSettings.transformer_overrides`.
Nothing here needs megatron-core or a GPU, so the flags of a cluster can be printed on a laptop.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig, YarnScaling
from megatron_qwen.parallel.layout import ParallelLayout, check_layout

SPEC_MODULE = "megatron_qwen.model.spec"
# The two contracts of Megatron-LM: 0.19 and newer call what they import, older releases take it as it is.
SPECS: Mapping[str, tuple[str, ...]] = {
    "function": ("--spec", SPEC_MODULE, "get_qwen_layer_spec"),
    "object": ("--spec", SPEC_MODULE, "QWEN_LAYER_SPEC"),
    "none": (),
}
DTYPE_FLAGS: Mapping[str, tuple[str, ...]] = {"bfloat16": ("--bf16",), "float16": ("--fp16",), "float32": ()}
IMPLEMENTATIONS = ("transformer_engine", "local")
RECOMPUTE: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "selective": ("--recompute-granularity", "selective"),
    "full": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
}


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What a launch adds to the model.

    Attributes:
        layout: parallel sizes.
        world_size: number of GPUs.
        seq_length: tokens per sample.
        micro_batch_size: samples per forward pass of one data-parallel rank.
        global_batch_size: samples per optimizer step; None leaves it to Megatron-LM (one micro-batch per rank).
        dtype: "bfloat16", "float16" or "float32".
        transformer_impl: "transformer_engine" or "local".
        fusions: use the fused kernels of Megatron-LM and Transformer Engine.
        spec: "function", "object" or "none": how, if at all, our layer specification is named.
        recompute: "none", "selective" or "full" activation recomputation.
        tokenizer: folder with the tokenizer files, or None to leave the tokenizer flags out.
    """

    layout: ParallelLayout = field(default_factory=ParallelLayout)
    world_size: int = 1
    seq_length: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    dtype: str = "bfloat16"
    transformer_impl: str = "transformer_engine"
    fusions: bool = True
    spec: str = "function"
    recompute: str = "none"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("dtype", tuple(DTYPE_FLAGS)),
            ("transformer_impl", IMPLEMENTATIONS),
            ("spec", tuple(SPECS)),
            ("recompute", tuple(RECOMPUTE)),
        )
        wrong = [
            f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
            for name, allowed in choices
            if getattr(self, name) not in allowed
        ]
        if wrong:
            raise ConfigError("launch settings: " + "; ".join(wrong))

    @property
    def grouped_gemm(self) -> bool:
        """Whether the experts of a layer run as one grouped GEMM; Megatron's local modules have none."""
        return self.transformer_impl == "transformer_engine"

    def rope_fusion(self, config: QwenConfig) -> bool:
        """Whether rotary embedding is fused: a Transformer Engine kernel, for plain RoPE only."""
        return self.fusions and self.transformer_impl == "transformer_engine" and config.rope_scaling is None

    def transformer_overrides(self, config: QwenConfig) -> dict[str, Any]:
        """Return the overrides with which `config.to_transformer_config` equals these flags on any machine."""
        overrides: dict[str, Any] = {
            "transformer_impl": self.transformer_impl,
            "bias_activation_fusion": self.fusions,
            "bias_dropout_fusion": self.fusions,
            "masked_softmax_fusion": self.fusions,
            "apply_rope_fusion": self.rope_fusion(config),
            "gradient_accumulation_fusion": self.fusions and self.transformer_impl == "transformer_engine",
        }
        if config.is_moe:
            overrides["moe_grouped_gemm"] = self.grouped_gemm
        if self.recompute != "none":
            overrides["recompute_granularity"] = self.recompute
        if self.recompute == "full":
            overrides |= {"recompute_method": "uniform", "recompute_num_layers": 1}
        return overrides


@dataclass(frozen=True, kw_only=True)
class FlagArrays:
    """Flags in groups, and what a reader must know that no flag can say.

    Attributes:
        groups: name of the shell array to its words, each value as one word.
        notes: one sentence each.
    """

    groups: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def words(self) -> tuple[str, ...]:
        """Return all flags as one argument vector."""
        return tuple(word for group in self.groups.values() for word in group)

    def as_bash(self) -> str:
        """Return bash array definitions, one flag with its values per line, notes as comments."""
        lines = [f"# {note}" for note in self.notes]
        for name, words in self.groups.items():
            lines += [f"{name}=(", *(f"    {shlex.join(flag)}" for flag in split_flags(words)), ")"]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Return {"groups": {name: words}, "notes": [...]}."""
        return json.dumps(
            {"groups": {name: list(words) for name, words in self.groups.items()}, "notes": self.notes}, indent=2
        )


def split_flags(words: tuple[str, ...]) -> list[list[str]]:
    """Split an argument vector into [flag, value, ...] lists."""
    starts = (sum(word.startswith("--") for word in words[: i + 1]) for i in range(len(words)))
    return [
        [word for _, word in group] for _, group in groupby(zip(starts, words, strict=True), key=lambda pair: pair[0])
    ]


def megatron_lm_flags(config: QwenConfig, settings: LaunchSettings) -> FlagArrays:
    """Return the flag arrays for `pretrain_gpt.py`.

    Learning rate, data and checkpoint folders are the run's own and not among them.

    Raises:
        ConfigError: the layout does not fit the model, the GPUs or the batch; or a setting that Megatron-LM has no
            flag for (a rotary base with a fraction).
    """
    check_layout(
        settings.layout,
        config.shape(),
        world_size=settings.world_size,
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        global_batch_size=settings.global_batch_size,
        overlap_p2p=settings.layout.vpp > 1,
    )
    groups = {"GPT_MODEL_ARGS": _model_flags(config, settings)}
    if config.is_moe:
        groups["MOE_ARGS"] = _moe_flags(config, settings)
    groups["MODEL_PARALLEL_ARGS"] = _parallel_flags(config, settings.layout)
    groups["TRAINING_ARGS"] = _training_flags(config, settings)
    return FlagArrays(groups=groups, notes=_notes(config, settings))


def _model_flags(config: QwenConfig, settings: LaunchSettings) -> tuple[str, ...]:
    if config.rope_theta != int(config.rope_theta):
        raise ConfigError(f"rope_theta: got {config.rope_theta}; Megatron-LM's --rotary-base takes whole numbers only")
    flags = [
        *SPECS[settings.spec],
        *("--num-layers", config.num_hidden_layers),
        *("--hidden-size", config.hidden_size),
        *("--ffn-hidden-size", config.intermediate_size),
        *("--num-attention-heads", config.num_attention_heads),
        *("--group-query-attention", "--num-query-groups", config.num_key_value_heads),
        *("--kv-channels", config.head_dim),
        *("--seq-length", settings.seq_length),
        *("--max-position-embeddings", max(config.max_position_embeddings, settings.seq_length)),
        *_position_flags(config.rope_scaling),
        *("--rotary-base", int(config.rope_theta)),
        *("--normalization", "RMSNorm", "--norm-epsilon", config.rms_norm_eps),
        *("--swiglu", "--disable-bias-linear", "--add-qkv-bias"),
        *("--attention-dropout", config.attention_dropout, "--hidden-dropout", 0.0),
        *("--init-method-std", config.initializer_range),
        # The rows of the released models are no multiple of what Megatron-LM pads to; it must not pad again.
        *("--padded-vocab-size", config.vocab_size, "--make-vocab-size-divisible-by", 1),
    ]
    if not config.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if settings.tokenizer is not None:
        flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", settings.tokenizer]
    return tuple(map(str, flags))


def _position_flags(scaling: YarnScaling | None) -> list[Any]:
    if scaling is None:
        return ["--position-embedding-type", "rope"]
    from megatron_qwen.model.rope import yarn_fields

    fields = yarn_fields(scaling)
    flags: list[Any] = [
        *("--position-embedding-type", "yarn"),
        *("--rotary-scaling-factor", scaling.factor),
        *("--yarn-original-max-position-embeddings", scaling.original_max_position_embeddings),
        *("--yarn-beta-fast", scaling.beta_fast, "--yarn-beta-slow", scaling.beta_slow),
        "--yarn-correction-range-round-to-int" if scaling.truncate else "--no-yarn-correction-range-round-to-int",
    ]
    if fields["yarn_mscale"] is not None:
        flags += ["--mscale", fields["yarn_mscale"], "--mscale-all-dim", fields["yarn_mscale_all_dim"]]
    return flags


def _moe_flags(config: QwenConfig, settings: LaunchSettings) -> tuple[str, ...]:
    from megatron_qwen.model.transformer_config import megatron_aux_loss_coefficient

    flags: list[Any] = [
        *("--num-experts", config.num_experts),
        *("--moe-router-topk", config.num_experts_per_tok),
        *("--moe-ffn-hidden-size", config.moe_intermediate_size),
        *("--moe-shared-expert-intermediate-size", config.shared_expert_intermediate_size),
        *("--moe-shared-expert-gate", "--moe-layer-freq", layer_pattern(config.moe_layers())),
        *("--moe-router-dtype", "fp32", "--moe-router-load-balancing-type", "aux_loss"),
        *("--moe-aux-loss-coeff", repr(megatron_aux_loss_coefficient(config))),
        *("--moe-token-dispatcher-type", "alltoall"),
    ]
    # Softmax over the chosen experts only is what renormalising them after a softmax over all amounts to.
    flags += [] if config.norm_topk_prob else ["--moe-router-pre-softmax"]
    flags += ["--moe-grouped-gemm"] if settings.grouped_gemm else []
    return tuple(map(str, flags))


def layer_pattern(is_moe: tuple[bool, ...]) -> str:
    """Return Megatron's list expression: (True, True, False) is "([1]*2+[0]*1)"; "1" if every layer is MoE."""
    if all(is_moe):
        return "1"
    return "(" + "+".join(f"[{int(kind)}]*{len(list(run))}" for kind, run in groupby(is_moe)) + ")"


def _parallel_flags(config: QwenConfig, layout: ParallelLayout) -> tuple[str, ...]:
    stages = layout.layers_per_stage(config.num_hidden_layers)
    flags: list[Any] = [
        *("--tensor-model-parallel-size", layout.tp),
        *("--pipeline-model-parallel-size", layout.pp),
        *("--context-parallel-size", layout.cp),
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ]
    if layout.sequence_parallel:
        flags.append("--sequence-parallel")
    if layout.pp_layout is not None and layout.pp > 1:
        flags += ["--pipeline-model-parallel-layout", pipeline_pattern(stages)]
    elif layout.vpp > 1:
        flags += ["--num-layers-per-virtual-pipeline-stage", stages[0]]
    if config.is_moe:
        flags += ["--expert-model-parallel-size", layout.ep]
        flags += ["--expert-tensor-parallel-size", layout.expert_tensor_parallel_size]
    return tuple(map(str, flags))


def pipeline_pattern(stages: tuple[int, ...]) -> str:
    """Return Megatron's pipeline pattern: (3, 5) is "Et*3|t*5L" (embedding and loss count as layers there)."""
    parts = [f"t*{layers}" for layers in stages]
    return "|".join(["E" + parts[0], *parts[1:-1], parts[-1] + "L"])


def _training_flags(config: QwenConfig, settings: LaunchSettings) -> tuple[str, ...]:
    flags: list[Any] = [
        *DTYPE_FLAGS[settings.dtype],
        *("--micro-batch-size", settings.micro_batch_size),
        *("--transformer-impl", settings.transformer_impl),
        # Both do nothing with Transformer Engine; with local modules they are this project's settings.
        *("--attention-softmax-in-fp32", "--no-persist-layer-norm"),
        *RECOMPUTE[settings.recompute],
    ]
    if settings.global_batch_size is not None:
        flags += ["--global-batch-size", settings.global_batch_size]
    if not settings.fusions:
        flags += ["--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"]
    if not settings.rope_fusion(config):
        flags.append("--no-rope-fusion")
    if not (settings.fusions and settings.transformer_impl == "transformer_engine"):
        flags.append("--no-gradient-accumulation-fusion")
    return tuple(map(str, flags))


def _notes(config: QwenConfig, settings: LaunchSettings) -> tuple[str, ...]:
    notes = []
    if config.dual_chunk_attention is not None:
        notes.append(
            "Dual chunk attention is no Megatron-LM option: these flags train with plain attention, which is the same "
            f"up to {config.dual_chunk_attention.chunk_length:,} tokens; beyond that use `megatron-qwen train`."
        )
    if settings.tokenizer is None:
        notes.append("No tokenizer is named: add --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR.")
    if settings.spec == "object":
        notes.append("QWEN_LAYER_SPEC needs Transformer Engine for --sequence-parallel.")
    return tuple(notes)
