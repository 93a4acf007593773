"""The released models' configurations, with the settings in which base and instruct files differ.

Those settings (`rms_norm_eps`, `max_position_embeddings`, `eos_token_id`) follow no rule by size, so
each checkpoint is one row. A longer `max_position_embeddings` in a base file is not a longer training:
all dense models but the two 1M ones were trained up to 32,768 tokens. A preset is for building and
planning; a checkpoint on disk is always read with its own config.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, did_you_mean

END_OF_TEXT = 151_643
IM_END = 151_645

# size: layers, hidden, query heads, key-value heads, FFN, vocabulary rows, tied embeddings
_DENSE = {
    "0.5b": (24, 896, 14, 2, 4864, 151_936, True),
    "1.5b": (28, 1536, 12, 2, 8960, 151_936, True),
    "3b": (36, 2048, 16, 2, 11_008, 151_936, True),
    "7b": (28, 3584, 28, 4, 18_944, 152_064, False),
    "14b": (48, 5120, 40, 8, 13_824, 152_064, False),
    "32b": (64, 5120, 40, 8, 27_648, 152_064, False),
    "72b": (80, 8192, 64, 8, 29_568, 152_064, False),
}
# size: rms_norm_eps and max_position_embeddings of the base file; every instruct file has 1e-6 and 32,768
_BASE = {
    "0.5b": (1e-6, 32_768),
    "1.5b": (1e-6, 131_072),
    "3b": (1e-6, 32_768),
    "7b": (1e-6, 131_072),
    "14b": (1e-5, 131_072),
    "32b": (1e-5, 131_072),
    "72b": (1e-5, 131_072),
}


def _dense(size: str, *, eps: float, positions: int, eos: int, theta: float = 1e6) -> QwenConfig:
    layers, hidden, heads, kv_heads, ffn, vocab, tied = _DENSE[size]
    return QwenConfig(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=eps,
        rope_theta=theta,
        tie_word_embeddings=tied,
        bos_token_id=END_OF_TEXT,
        eos_token_id=eos,
    )


def _million(size: str) -> QwenConfig:
    base = _dense(size, eps=1e-5, positions=1_010_000, eos=IM_END, theta=1e7)
    chunks = DualChunkAttention(chunk_size=262_144, local_size=8192, original_max_position_embeddings=262_144)
    return replace(base, dual_chunk_attention=chunks)


_QWEN15_MOE_A2_7B = QwenConfig(
    model_type="qwen2_moe",
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    bos_token_id=END_OF_TEXT,
    eos_token_id=END_OF_TEXT,
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
    router_aux_loss_coef=0.001,
)
_QWEN2_57B_A14B = replace(
    _QWEN15_MOE_A2_7B,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=131_072,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=2560,
    shared_expert_intermediate_size=20_480,
)


def _all_presets() -> dict[str, QwenConfig]:
    presets = {}
    for size, (eps, positions) in _BASE.items():
        presets[f"qwen2.5-{size}"] = _dense(size, eps=eps, positions=positions, eos=END_OF_TEXT)
        presets[f"qwen2.5-{size}-instruct"] = _dense(size, eps=1e-6, positions=32_768, eos=IM_END)
    for size in ("7b", "14b"):
        presets[f"qwen2.5-{size}-instruct-1m"] = _million(size)
    for name, base, chat in (
        ("qwen1.5-moe-a2.7b", _QWEN15_MOE_A2_7B, "chat"),
        ("qwen2-57b-a14b", _QWEN2_57B_A14B, "instruct"),
    ):
        presets[name] = base
        presets[f"{name}-{chat}"] = replace(base, max_position_embeddings=32_768, eos_token_id=IM_END)
    return presets


PRESETS: Mapping[str, QwenConfig] = MappingProxyType(_all_presets())


def find_preset(name: str) -> QwenConfig:
    """Return a preset by its name in `PRESETS` or on the Hub ("Qwen/Qwen2.5-7B-Instruct"), in any case.

    The family may be left out where the size says which is meant: "7B", "7b-instruct", "A2.7B", "57B-A14B".

    Raises:
        ConfigError: no such preset; names the nearest.
    """
    key = name.strip().lower().removeprefix("qwen/")
    sized = [preset for preset in PRESETS if preset.endswith(f"-{key}")] if _is_size(key) else []
    if len(sized) == 1:
        return PRESETS[sized[0]]
    if key not in PRESETS:
        raise ConfigError(
            f"no preset {name!r}.{_nearest(key)} Known: {', '.join(PRESETS)}. "
            "For another model give the folder with its config.json."
        )
    return PRESETS[key]


def _is_size(key: str) -> bool:
    return re.match(r"a?\d", key) is not None


def _nearest(key: str) -> str:
    inside = [preset for preset in PRESETS if f"-{key}-" in preset]
    if inside:
        return f" Did you mean {inside[0]!r}?"
    return did_you_mean(f"qwen2.5-{key}" if _is_size(key) else key, PRESETS)
