"""The model that every contestant of a case starts from, as a Hugging Face folder with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from megatron_qwen.benchmark.memory import keep_layers
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


def find_config(source: str, *, layers: int | None, seq_length: int, vocab_size: int | None = None) -> QwenConfig:
    """Return the configuration to measure.

    Args:
        source: "tiny", "tiny-moe", "small", "small-moe", a preset's name, or a Hugging Face folder.
        layers: keep this many layers; None keeps all.
        seq_length: positions that the model must have.
        vocab_size: rows of the embedding; None keeps the model's.

    Raises:
        ConfigError: no such model, or one with fewer layers or positions, or no vocabulary.
    """
    if source in BUILT_IN:
        config = BUILT_IN[source]()
    else:
        config = QwenConfig.from_hf(source) if Path(source).is_dir() else QwenConfig.from_preset(source)
    if config.is_moe:
        config = dataclasses.replace(config, router_aux_loss_coef=_AUX_LOSS_COEFFICIENT)
    if seq_length > config.max_position_embeddings:
        raise ConfigError(f"--seq-length {seq_length}: {source} has {config.max_position_embeddings} positions")
    if vocab_size is not None:
        if vocab_size < 2:
            raise ConfigError(f"--vocab-size: got {vocab_size}, expected at least 2")
        config = dataclasses.replace(config, vocab_size=vocab_size)
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ConfigError(f"--layers {layers}: {source} has {config.num_hidden_layers}, expected 1 to that")
    return keep_layers(config, layers)


def write_model(folder: Path, config: QwenConfig, *, with_weights: bool = True) -> Path:
    """Write `config` to `folder`, created if needed, with random weights in float32 if wanted."""
    if with_weights:
        return write_tiny_hf(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    return folder
