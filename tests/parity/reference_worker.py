"""transformers as reference, in a process of its own: logits, loss and gradients of a folder.

Usage: reference_worker.py FOLDER ...
Each folder holds tokens.bin ("tokens" [B, S] int64) and receives reference-float32.bin (logits, loss,
grad.*) and reference-bfloat16.bin (logits, loss). The loss is the mean cross-entropy of the next token.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(*folders: str) -> None:
    for folder in folders:
        for dtype in ("float32", "bfloat16"):
            compute(Path(folder), dtype)


def compute(folder: Path, dtype: str) -> None:
    tokens = load_file(folder / "tokens.bin")["tokens"]
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    model.train()
    result = model(input_ids=tokens, labels=tokens, use_cache=False)
    tensors = {"logits": result.logits.detach().float().contiguous(), "loss": result.loss.detach().float()}
    if dtype == "float32":
        result.loss.backward()
        for name, parameter in model.named_parameters():
            tensors |= unfused("grad." + name, parameter.grad)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / f"reference-{dtype}.bin"
    )


def unfused(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give the fused experts of transformers 5 the names that released checkpoints have."""
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return {
            f"{stem}{e}.{part}_proj.weight": half
            for e, both in enumerate(tensor)
            for part, half in zip(("gate", "up"), both.chunk(2), strict=True)
        }
    if name.endswith("experts.down_proj"):
        stem = name.removesuffix("down_proj")
        return {f"{stem}{e}.down_proj.weight": each for e, each in enumerate(tensor)}
    return {name: tensor}


if __name__ == "__main__":
    main(*sys.argv[1:])
