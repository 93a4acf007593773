"""`QwenConfig`: one validated, immutable description of a Qwen2, Qwen2.5 or Qwen-MoE model.

It carries what the checkpoint's own config.json says and nothing else. How it is read from and
written to config.json is in `hf_config.py`; how it becomes Megatron-Core's `TransformerConfig`, in
`transformer_config.py`. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_qwen.parallel.layout import ModelShape, ParallelLayout

MODEL_TYPES = ("qwen2", "qwen2_moe")
TORCH_DTYPES = ("float32", "bfloat16", "float16")
CAPS = ("released", "paper")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest choice, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071) with transformers' field names and meaning.

    Attributes:
        factor: target length over trained length, >= 1.
        original_max_position_embeddings: trained length in tokens.
        beta_fast, beta_slow: rotations within the trained length above which a frequency is kept,
            and below which it is divided by `factor`.
        attention_factor: multiplies cos and sin; None derives it from factor (and the mscales).
        mscale, mscale_all_dim: with both set, attention_factor is the quotient of the two scales.
        truncate: round the correction range outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not self.factor >= 1.0:
            problems.append(f"factor: got {self.factor}, expected >= 1")
        if not self.original_max_position_embeddings > 0:
            problems.append(
                f"original_max_position_embeddings: got {self.original_max_position_embeddings}, expected > 0"
            )
        if not self.beta_fast >= self.beta_slow > 0:
            problems.append(
                f"beta_fast, beta_slow: got {self.beta_fast}, {self.beta_slow}, expected beta_fast >= beta_slow > 0"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            problems.append(f"attention_factor: got {self.attention_factor}, expected > 0 or null")
        if problems:
            raise ConfigError("rope scaling (yarn): " + "; ".join(problems))

    def concentration(self) -> float:
        """Return the factor that multiplies cos and sin: 0.1 ln(factor) + 1 unless set otherwise.

        The rule is transformers' `_compute_yarn_parameters`; the formula is YaRN's section 3.4.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(self.factor, self.mscale_all_dim)
        return _yarn_mscale(self.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class DualChunkAttention:
    """`dual_chunk_attention_config` of the 1M-token checkpoints.

    Attributes:
        chunk_size: trained length in tokens (the field's name in the files; the length of one chunk
            is `chunk_size - local_size`).
        local_size: window, in tokens, in which the previous chunk is seen at true distances.
        original_max_position_embeddings: length from which attention is rescaled; 0 for never.
        cap: largest position of a query: "released" for chunk_size, as in the released code, or "paper" for
            chunk_size - 1. Not among the released files' entries; written where it is "paper".
        sparse_attention_enabled, sparse_attention_threshold, sparse_attention_last_q: settings of the
            sparse prefill; None where the file does not have them.
        sparse_attention_config: its budgets by layer and head, as a `sparse_attention_config.json` has them; None
            where they are not in config.json.
        other_fields: further entries of the file, kept for export.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0
    cap: str = "released"
    sparse_attention_enabled: bool | None = None
    sparse_attention_threshold: int | None = None
    sparse_attention_last_q: int | None = None
    sparse_attention_config: Any = field(default=None, compare=False, repr=False)
    other_fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = []
        for name in ("chunk_size", "local_size", "original_max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                problems.append(f"{name}: got {value!r}, expected a whole number >= 0")
        if not problems and self.local_size >= self.chunk_size:
            problems.append(
                f"got chunk_size {self.chunk_size}, local_size {self.local_size}, expected local_size < chunk_size"
            )
        if self.cap not in CAPS:
            problems.append(f"cap: got {self.cap!r}, expected one of {', '.join(CAPS)}")
        problems += self._sparse_problems()
        if problems:
            raise ConfigError("dual_chunk_attention_config: " + "; ".join(problems))

    def _sparse_problems(self) -> Iterable[str]:
        if self.sparse_attention_enabled not in (None, True, False):
            yield f"sparse_attention_enabled: got {self.sparse_attention_enabled!r}, expected true or false"
        for name, least in (("sparse_attention_threshold", 0), ("sparse_attention_last_q", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                yield f"{name}: got {value!r}, expected a whole number >= {least}"

    @property
    def chunk_length(self) -> int:
        """Tokens of one chunk; up to this length attention is the ordinary one."""
        return self.chunk_size - self.local_size


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """A Qwen2/Qwen2.5 dense model (`qwen2`) or a Qwen MoE model (`qwen2_moe`).

    Field names are config.json's. The MoE fields are zero or empty for a dense model.

    Attributes:
        vocab_size: rows of the embedding (151,936 or 152,064 for the released models), not tokens.
        intermediate_size: width of a dense layer's MLP; a MoE model uses it in its dense layers only.
        rope_scaling: YaRN settings or None.
        eos_token_id: one id, several, or None.
        num_experts: routed experts per MoE layer.
        shared_expert_intermediate_size: summed width of the shared experts, which are stored as one.
        norm_topk_prob: renormalise the chosen experts' probabilities to sum to one.
        router_aux_loss_coef: coefficient of transformers' load-balancing loss over all layers.
        decoder_sparse_step, mlp_only_layers: which layers are MoE; see `moe_layers`.
        inert_fields: config.json entries without influence on the computation, kept for export.

    Raises:
        ConfigError: the fields contradict each other; every contradiction is listed.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = False
    rope_scaling: YarnScaling | None = None
    dual_chunk_attention: DualChunkAttention | None = None
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    torch_dtype: str = "bfloat16"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    inert_fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = [*self._type_problems()] or [*self._shape_problems(), *self._moe_problems()]
        if problems:
            raise ConfigError("model configuration: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_moe(self) -> bool:
        """Whether the model is of the MoE family (some of its layers may still be dense)."""
        return self.model_type == "qwen2_moe"

    def moe_layers(self) -> tuple[bool, ...]:
        """Return for each decoder layer whether it is a MoE layer.

        Layer i is MoE iff it is not in mlp_only_layers, there are experts, and
        (i + 1) % decoder_sparse_step == 0 (transformers' Qwen2MoeDecoderLayer).
        """
        return tuple(
            self.is_moe and i not in self.mlp_only_layers and (i + 1) % self.decoder_sparse_step == 0
            for i in range(self.num_hidden_layers)
        )

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> QwenConfig:
        """Read a Hugging Face folder, a config.json, or its parsed content.

        Both spellings of the rotary settings are read: `rope_theta`/`rope_scaling` (transformers 4)
        and `rope_parameters` (transformers 5).

        Raises:
            ConfigError: another architecture, missing, unsupported, misspelt or contradictory fields.
            IncompleteInputError: there is no config.json.
            CorruptInputError: config.json is not a JSON object.
        """
        from megatron_qwen.model.hf_config import config_from_hf

        return config_from_hf(source)

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers 4 and 5 read alike."""
        from megatron_qwen.model.hf_config import config_to_hf

        return config_to_hf(self)

    @classmethod
    def from_preset(cls, name: str) -> QwenConfig:
        """Return a released model's configuration; see `presets.find_preset` for the names taken."""
        from megatron_qwen.model.presets import find_preset

        return find_preset(name)

    def shape(self) -> ModelShape:
        """Return the integers that decide which parallel layouts are possible."""
        from megatron_qwen.parallel.layout import ModelShape

        return ModelShape(
            num_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_key_value_heads,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            num_experts=self.num_experts,
            moe_ffn_hidden_size=self.moe_intermediate_size,
            moe_shared_expert_size=self.shared_expert_intermediate_size,
            moe_router_topk=self.num_experts_per_tok,
        )

    def to_transformer_config(
        self, layout: ParallelLayout | None = None, *, dtype: torch.dtype | None = None, **overrides: Any
    ) -> TransformerConfig:
        """Return Megatron-Core's configuration of this model; see `transformer_config.py`."""
        from megatron_qwen.model.transformer_config import make_transformer_config

        return make_transformer_config(self, layout, dtype=dtype, **overrides)

    def _type_problems(self) -> Iterable[str]:
        if self.model_type not in MODEL_TYPES:
            yield f"model_type: got {self.model_type!r}, expected one of {MODEL_TYPES}"
        if self.torch_dtype not in TORCH_DTYPES:
            yield f"torch_dtype: got {self.torch_dtype!r}, expected one of {TORCH_DTYPES}"
        for spec in dataclasses.fields(self):
            value, expected = getattr(self, spec.name), _SCALAR_TYPES.get(str(spec.type))
            is_bool = isinstance(value, bool)
            if expected and (not isinstance(value, expected) or is_bool != (expected is bool)):
                yield f"{spec.name}: got {value!r}, expected {spec.type}"

    def _shape_problems(self) -> Iterable[str]:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
        ):
            if not getattr(self, name) > 0:
                yield f"{name}: got {getattr(self, name)}, expected > 0"
                return
        for name, limit in _LIMITS.items():
            if getattr(self, name) > limit:
                yield f"{name}: got {getattr(self, name)}, expected at most {limit}"
        if self.num_hidden_layers * self.num_experts > MAX_EXPERTS:
            yield f"{self.num_hidden_layers} layers x {self.num_experts} experts: expected at most {MAX_EXPERTS} in all"
        if self.hidden_size % self.num_attention_heads:
            yield f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
        elif self.head_dim % 2:
            yield f"head size {self.head_dim} (hidden_size / num_attention_heads) is odd; RoPE needs it even"
        if self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not 0.0 <= self.attention_dropout < 1.0:
            yield f"attention_dropout: got {self.attention_dropout}, expected 0 <= p < 1"
        if not self.initializer_range > 0:
            yield f"initializer_range: got {self.initializer_range}, expected > 0"

    def _moe_problems(self) -> Iterable[str]:
        if not self.is_moe:
            extra = [name for name in _MOE_SIZES if getattr(self, name)]
            if extra:
                yield f"{', '.join(extra)}: set on a dense model ('qwen2'); use 'qwen2_moe' or leave them out"
            return
        for name in _MOE_SIZES:
            if not getattr(self, name) > 0:
                yield f"{name}: got {getattr(self, name)}, expected > 0 for a MoE model"
        if self.num_experts_per_tok > self.num_experts:
            yield f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}"
        if self.decoder_sparse_step < 1:
            yield f"decoder_sparse_step: got {self.decoder_sparse_step}, expected >= 1"
            return
        stray = [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        if stray:
            yield f"mlp_only_layers: {stray} are not layers of a model with {self.num_hidden_layers}"
        if not any(self.moe_layers()):
            yield "decoder_sparse_step and mlp_only_layers leave no MoE layer; describe the model as 'qwen2' instead"
        if self.router_aux_loss_coef < 0:
            yield f"router_aux_loss_coef: got {self.router_aux_loss_coef}, expected >= 0"


# Far beyond any model; a damaged or hostile config.json must not keep us enumerating parameters for hours.
_LIMITS = {"num_hidden_layers": 4096, "vocab_size": 2**31, "hidden_size": 2**24, "intermediate_size": 2**28}
MAX_EXPERTS = 200_000
_MOE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_SCALAR_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}
