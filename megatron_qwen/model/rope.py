"""Rotary positions between Megatron-Core, which has angles, and `ops.qkv_rope`, which takes tables; and YaRN.

Megatron's `YarnRotaryEmbedding` computes transformers' frequencies (same correction range, same ramp,
fp32), so nothing is reimplemented here. What has no field of its own is transformers' explicit
`attention_factor`; it is expressed through Megatron's two mscales.

Shapes: S tokens of a sequence, B sequences, T tokens of packed sequences, R rotated dimensions of a head, P positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import YarnScaling
from megatron_qwen.parallel.per_tensor import PerTensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What `ops.qkv_rope` takes: fp32 tables [P, R / 2], and the row of each token; None for row s at token s."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None


def rotation_of(
    angles: torch.Tensor, config: Any, *, tokens: int, offset: int, packed: PackedSeqParams | None
) -> Rotation:
    """Return the tables of GPTModel's angles, and where in them each token of this rank looks.

    The tables are made once for all layers: Megatron hands the same angles to each of them.

    Args:
        angles: radians [P, 1, 1, R], both halves alike; [P, B, 1, R] where rows of the batch differ in position.
            With context parallelism P runs over this rank's tokens, except for packed sequences.
        config: Megatron's configuration, of which YaRN's factors are read.
        tokens: S, or T of packed sequences.
        offset: tokens that a key-value cache holds already.
        packed: boundaries of packed sequences, or None.
    """
    cos, sin = _TABLES.get(angles, lambda: _tables(angles, config))
    if packed is not None and packed.qkv_format == "thd":
        bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        return Rotation(cos=cos, sin=sin, positions=_POSITIONS.get(bounds, lambda: _packed_positions(bounds)))
    batch = angles.shape[1]
    rows = slice(offset * batch, (offset + tokens) * batch)
    own_row = None if batch == 1 else torch.arange(tokens * batch, device=cos.device).view(tokens, batch)
    return Rotation(cos=cos[rows], sin=sin[rows], positions=own_row)


def model_tables(model: Any, length: int, *, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of positions 0 to length - 1 of a GPTModel, fp32 [length, R / 2], YaRN's factor in them.

    Args:
        model: gives frequencies and factor.
        length: positions.
        exact: compute angles in fp64, as Dual Chunk Attention does in training; else Megatron's own, of fp32.
    """
    angles = model.rotary_pos_emb(2 if exact else length)
    angles = angles[0] if isinstance(angles, tuple) else angles  # YaRN's module returns (angles, factor)
    if exact:
        frequencies = angles[1].flatten()[: angles.shape[-1] // 2].float()  # the angles at position 1
        return ops.rope_tables(frequencies, length, mscale=_yarn_factor(model.config))
    cos, sin = _tables(angles, model.config)
    return cos, sin


def _tables(angles: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin times YaRN's factor, one row per position (and per row of the batch where they differ)."""
    mscale = _yarn_factor(config)
    with torch.inference_mode(False):  # so that tables made while generating text serve a training step, too
        half = angles[..., : angles.shape[-1] // 2].flatten(0, -2).float()
        return half.cos() * mscale, half.sin() * mscale


def _yarn_factor(config: Any) -> float:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config,
    )

    return float(_yarn_get_concentration_factor_from_config(config))


def _packed_positions(bounds: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state

    return ops.packed_positions(
        bounds,
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
    )


_TABLES, _POSITIONS = PerTensor(), PerTensor()


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
