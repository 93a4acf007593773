"""An independent statement of how Hugging Face tensors lie in Megatron-Core, and both models' results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_qwen.model.build import build_model
from megatron_qwen.model.config import QwenConfig

_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}


def expected_parameter(name: str, hf: Mapping[str, torch.Tensor], config: QwenConfig) -> torch.Tensor:
    """Return what Megatron's parameter `name` must be (weights or gradients) on one rank."""
    if name == "embedding.word_embeddings.weight":
        return hf["model.embed_tokens.weight"]
    if name == "output_layer.weight":
        return hf["lm_head.weight"]
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    _, _, number, rest = name.split(".", 3)
    layer = f"model.layers.{number}."
    if rest in _LAYER:
        return hf[layer + _LAYER[rest]]
    if rest.startswith("self_attention.linear_qkv."):
        return _interleave([hf[f"{layer}self_attn.{x}_proj.{rest.rsplit('.', 1)[1]}"] for x in "qkv"], config)
    stem = layer + rest.rsplit(".", 2)[0].replace("experts.local_experts.", "experts.").replace(
        "shared_experts", "shared_expert"
    )
    if rest.endswith("linear_fc2.weight"):
        return hf[stem + ".down_proj.weight"]
    assert rest.endswith("linear_fc1.weight"), rest
    return torch.cat([hf[stem + ".gate_proj.weight"], hf[stem + ".up_proj.weight"]])


def _interleave(qkv: list[torch.Tensor], config: QwenConfig) -> torch.Tensor:
    groups = config.num_key_value_heads
    return torch.cat([rows for group in zip(*(x.chunk(groups) for x in qkv), strict=True) for rows in group])


def load_hf_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_references(tokens: Mapping[Path, torch.Tensor]) -> None:
    """Let transformers compute on every folder, in one process of its own; read the results by `reference`."""
    for folder, tokens_BS in tokens.items():
        save_file({"tokens": tokens_BS}, folder / "tokens.bin")
    command = [sys.executable, str(Path(__file__).with_name("reference_worker.py")), *map(str, tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


def reference(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    return load_file(folder / f"reference-{dtype}.bin")


def build_from(folder: Path, dtype: torch.dtype = torch.float32, **options):
    """Return (config, model) with the folder's weights."""
    config = QwenConfig.from_hf(folder)
    model = build_model(config, dtype=dtype, **options)
    weights = load_hf_weights(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = expected_parameter(name, weights, config)
            assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
            parameter.copy_(value)
    return config, model


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model.eval()(tokens, positions, None).float()


def loss_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, as transformers computes it."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model.train()(tokens, positions, None, labels=tokens.roll(-1, 1))[:, :-1].mean()
