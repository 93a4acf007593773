"""What the ranks of test_moe_equality.py run: recipes with the local backend's MoE modules, or with Megatron-Core's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from torch.nn import functional

from megatron_qwen.testing.ranks import leave_layout
from megatron_qwen.training.recipe import Recipe

Curves = dict[str, list[float]]


@contextlib.contextmanager
def megatrons_own_modules() -> Iterator[None]:
    """Models built meanwhile have MoELayer, TopKRouter, SequentialMLP and SharedExpertMLP, and torch's own SwiGLU."""
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_qwen.model import spec

    class TorchSwiGLU(MegatronModule):
        def forward(self, packed):
            gate, up = packed.chunk(2, dim=-1)
            return functional.silu(gate) * up

    theirs = {"QwenMoELayer": MoELayer, "QwenRouter": TopKRouter, "LocalExperts": SequentialMLP, "SwiGLU": TorchSwiGLU}
    with mock.patch.multiple(spec, **theirs):
        yield


def train_both(recipes: list[tuple[Recipe, Recipe]]) -> list[tuple[Curves, Curves]]:
    """Train each pair in this rank, one with our modules, one with Megatron's; return their curves."""
    return [(train_one(ours), _with_megatrons(theirs)) for ours, theirs in recipes]


def _with_megatrons(recipe: Recipe) -> Curves:
    with megatrons_own_modules():
        return train_one(recipe)


def train_one(recipe: Recipe) -> Curves:
    """Train a recipe; return what its log says of every step."""
    from megatron_qwen.training.loop import train

    train(recipe, resume=False)
    lines = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()]
    # Another layout over the same process group: quicker than new processes.
    leave_layout()
    return {name: [line[name] for line in lines] for name in ("loss", "aux_loss", "grad_norm")}
