"""YaRN as Megatron-Core understands it.

Megatron's `YarnRotaryEmbedding` computes transformers' frequencies (same correction range, same ramp,
fp32), so nothing is reimplemented here. What has no field of its own is transformers' explicit
`attention_factor`; it is expressed through Megatron's two mscales.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import YarnScaling


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
