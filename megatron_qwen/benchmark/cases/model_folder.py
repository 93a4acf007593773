"""The model that every contestant of a case starts from, as a Hugging Face folder with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

# "small" is large enough that a CPU spends its time in matrix products, as a GPU does with the real sizes.
_SMALL = {"hidden": 512, "heads": 8, "kv_heads": 2, "layers": 8, "vocab": 16_384, "max_position_embeddings": 4096}
BUILT_IN = {
    "tiny": lambda: tiny_dense(),
    "tiny-moe": lambda: tiny_moe(),
    "small": lambda: tiny_dense(ffn=2816, tied=True, **_SMALL),
    "small-moe": lambda: tiny_moe(ffn=2816, tied=True, experts=16, topk=4, expert_ffn=352, shared_ffn=1408, **_SMALL),
}


# Both compute the load-balancing loss, but transformers takes it over all layers at once and Megatron layer by layer,
# so their router gradients differ. Adam's first steps follow signs only: at the released 0.001 the losses of a small
# MoE differ by 6e-4 after one step; at this coefficient the work is the same and the losses agree.
_AUX_LOSS_COEFFICIENT = 1e-6


def find_config(source: str, *, layers: int | None, seq_length: int) -> QwenConfig:
    """Return the configuration to measure.

    Args:
        source: "tiny", "tiny-moe", "small", "small-moe", a preset's name, or a Hugging Face folder.
        layers: keep this many layers; None keeps all.
        seq_length: positions that the model must have.

    Raises:
        ConfigError: no such model, or one with fewer layers or positions.
    """
    if source in BUILT_IN:
        config = BUILT_IN[source]()
    else:
        config = QwenConfig.from_hf(source) if Path(source).is_dir() else QwenConfig.from_preset(source)
    if config.is_moe:
        config = dataclasses.replace(config, router_aux_loss_coef=_AUX_LOSS_COEFFICIENT)
    if seq_length > config.max_position_embeddings:
        raise ConfigError(f"--seq-length {seq_length}: {source} has {config.max_position_embeddings} positions")
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ConfigError(f"--layers {layers}: {source} has {config.num_hidden_layers}, expected 1 to that")
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        mlp_only_layers=tuple(each for each in config.mlp_only_layers if each < layers),
    )


def write_model(folder: Path, config: QwenConfig) -> Path:
    """Write `config` with random weights in float32 to `folder`, created if needed."""
    return write_tiny_hf(folder, config)
