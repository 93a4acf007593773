"""Rotary positions between Megatron-Core, which has angles, and `ops.qkv_rope`, which takes tables; and YaRN.

Frequencies are those of Megatron's modules always. There are two kinds of tables of them: plain attention takes the
angles that GPTModel hands on, in fp32 as Megatron and transformers compute them, and Dual Chunk Attention, which is for
long texts, `ops.rope_tables`, whose angles are fp64.

Megatron's `YarnRotaryEmbedding` computes transformers' frequencies (same correction range, same ramp,
fp32), so nothing is reimplemented here. What has no field of its own is transformers' explicit
`attention_factor`; it is expressed through Megatron's two mscales.

Shapes: S tokens of a sequence, T tokens of packed sequences, R rotated dimensions of a head, P positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import YarnScaling
from megatron_qwen.model.positions import rank_positions
from megatron_qwen.parallel.per_tensor import PerTensor

if TYPE_CHECKING:
    import torch.distributed as dist
    from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What `ops.qkv_rope` takes: fp32 tables [P, R / 2], and the row of each token; None for row s at token s."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None


def rotation_of(
    angles: torch.Tensor,
    config: Any,
    *,
    tokens: int,
    offset: int,
    packed: PackedSeqParams | None,
    group: dist.ProcessGroup | None,
) -> Rotation:
    """Return the tables of GPTModel's angles, and where in them each token of this rank looks.

    The tables are made once for all layers: Megatron hands the same angles to each of them.

    Args:
        angles: radians [P, 1, 1, R], both halves alike. With context parallelism P runs over this rank's tokens, except
            for packed sequences.
        config: Megatron's configuration, of which YaRN's factors are read.
        tokens: S, or T of packed sequences.
        offset: tokens that a key-value cache holds already.
        packed: boundaries of packed sequences, or None.
        group: context-parallel ranks; None for one.
    """
    cos, sin = _TABLES.get(angles, lambda: _tables(angles, config))
    if packed is not None and packed.qkv_format == "thd":
        return Rotation(cos=cos, sin=sin, positions=rank_positions(tokens, packed, cos.device, group=group))
    rows = slice(offset, offset + tokens)
    return Rotation(cos=cos[rows], sin=sin[rows], positions=None)


def model_tables(model: Any, length: int, *, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of positions 0 to length - 1 of a GPTModel, fp32 [length, R / 2], YaRN's factor in them.

    Args:
        model: gives frequencies and factor.
        length: positions.
        exact: compute angles in fp64, as Dual Chunk Attention does in training; else Megatron's own, of fp32.
    """
    if exact:
        return ops.rope_tables(_frequencies(model.rotary_pos_emb), length, mscale=_yarn_factor(model.config))
    return _tables(_angles(model.rotary_pos_emb, length), model.config)


def inverse_frequencies(dimensions: int, theta: float, scaling: YarnScaling | None) -> torch.Tensor:
    """Return the frequencies that a GPTModel of these settings has, radians per position, fp32 [R / 2].

    For tables where no model is at hand: a core attention sees its configuration only.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    options = {"kv_channels": dimensions, "rotary_percent": 1.0, "rotary_base": theta, "use_cpu_initialization": True}
    if scaling is None:
        return _frequencies(RotaryEmbedding(**options))
    yarn = YarnRotaryEmbedding(
        **options,
        scaling_factor=scaling.factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        correction_range_round_to_int=scaling.truncate,
    )
    return _frequencies(yarn)


def _frequencies(rotary: Any) -> torch.Tensor:
    """Those of Megatron's rotary module, fp32 [R / 2]: its angles at position 1."""
    angles = _angles(rotary, 2)
    return angles[1].flatten()[: angles.shape[-1] // 2].float()


def _angles(rotary: Any, length: int) -> torch.Tensor:
    """Those of Megatron's rotary module, [length, 1, 1, R], before context parallelism takes a rank's part."""
    angles = rotary.get_emb(length)
    return cast("torch.Tensor", angles[0] if isinstance(angles, tuple) else angles)  # YaRN's: (angles, factor)


def _tables(angles: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin times YaRN's factor, one row per position."""
    mscale = _yarn_factor(config)
    half = angles[..., : angles.shape[-1] // 2].flatten(0, -2).float()
    return half.cos() * mscale, half.sin() * mscale


def _yarn_factor(config: Any) -> float:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config,
    )

    return float(_yarn_get_concentration_factor_from_config(config))


_TABLES = PerTensor()


def yarn_fields(scaling: YarnScaling | None) -> dict[str, Any]:
    """Return the attributes that Megatron-Core reads off its configuration for position_embedding_type "yarn".

    Megatron multiplies cos and sin by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1, or by
    m(1) when either is None.

    Raises:
        ConfigError: an attention factor other than 1 with factor 1, which Megatron cannot express.
    """
    if scaling is None:
        return {}
    mscale, all_dim = None, None
    if scaling.attention_factor is not None or (scaling.mscale and scaling.mscale_all_dim):
        mscale, all_dim = _mscales(scaling)
    return {
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": all_dim,
        "yarn_correction_range_round_to_int": scaling.truncate,
    }


def _mscales(scaling: YarnScaling) -> tuple[float, float]:
    concentration = scaling.concentration()
    if scaling.factor > 1.0:
        return (concentration - 1.0) / (0.1 * math.log(scaling.factor)), 0.0
    if concentration != 1.0:
        raise ConfigError(
            f"rope scaling (yarn): attention_factor {concentration} needs a factor above 1, got {scaling.factor}"
        )
    return 1.0, 1.0
