"""Small models for tests and trials: configurations, and Hugging Face folders with random weights.

Norm weights are not one and biases not zero, so that a test sees when either is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_qwen.model.config import QwenConfig


def tiny_dense(
    *,
    tied: bool = False,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 112,
    vocab: int = 512,
    **fields: Any,
) -> QwenConfig:
    """Return a dense Qwen2.5 of test size; `fields` are further `QwenConfig` fields."""
    return QwenConfig(
        model_type="qwen2",
        tie_word_embeddings=tied,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocab,
        **{**_COMMON, **fields},
    )


def tiny_moe(
    *,
    tied: bool = False,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 112,
    vocab: int = 512,
    experts: int = 4,
    topk: int = 2,
    expert_ffn: int = 48,
    shared_ffn: int = 96,
    **fields: Any,
) -> QwenConfig:
    """Return a Qwen MoE of test size; `fields` are further `QwenConfig` fields."""
    return QwenConfig(
        model_type="qwen2_moe",
        tie_word_embeddings=tied,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocab,
        num_experts=experts,
        num_experts_per_tok=topk,
        moe_intermediate_size=expert_ffn,
        shared_expert_intermediate_size=shared_ffn,
        **{**_COMMON, "router_aux_loss_coef": 0.001, **fields},
    )


_COMMON: dict[str, Any] = {
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def tensor_shapes(config: QwenConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every tensor in a released checkpoint of this configuration, in file order."""
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for i, is_moe in enumerate(config.moe_layers()):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if not is_moe:
            yield from _mlp_shapes(f"{layer}.mlp", hidden, config.intermediate_size)
            continue
        yield f"{layer}.mlp.gate.weight", (config.num_experts, hidden)
        for expert in range(config.num_experts):
            yield from _mlp_shapes(f"{layer}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
        yield from _mlp_shapes(f"{layer}.mlp.shared_expert", hidden, config.shared_expert_intermediate_size)
        yield f"{layer}.mlp.shared_expert_gate.weight", (1, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (ffn, hidden)
    yield f"{prefix}.up_proj.weight", (ffn, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, ffn)


def write_tiny_hf(
    folder: Path,
    config: QwenConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a Hugging Face folder (config.json, safetensors, index if sharded) with random weights.

    Matrices are normal with a standard deviation of fan_in^-0.5 (the router's four times that, so that
    its choice is clear), biases normal with 0.5, norm weights uniform in [0.5, 1.5].

    Args:
        folder: created if needed.
        config: the model; its torch_dtype entry is written as `dtype`.
        seed: seed of the weights.
        dtype: dtype of the tensors on disk.
        max_shard_bytes: start a new file when the present one would exceed this many bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **config.to_hf(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, shape in tensor_shapes(config):
        tensor = _random_weight(name, shape, generator).to(dtype)
        if max_shard_bytes is not None and shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    _write_shards(folder, shards)
    return folder


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.rand(shape, generator=generator) + 0.5
    if name.endswith(".bias"):
        return torch.randn(shape, generator=generator) * 0.5
    gain = 4.0 if name.endswith("mlp.gate.weight") else 1.0
    std: float = gain * shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * std


def _write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
