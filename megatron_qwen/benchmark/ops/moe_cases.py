"""Tokens of a mixture of experts into expert order and back.

Shapes: T tokens, H hidden, E experts, k experts per token; x [T, H], rows in expert order [T k, H], weights [T, k].
Tokens mix, so nothing is checked in pieces.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import OpCase, Sizes, Workload, random_normal
from megatron_qwen.model.config import QwenConfig


def _sizes(config: QwenConfig, length: int) -> dict[str, int]:
    if not config.num_experts or not config.num_experts_per_tok:
        return {}
    return {
        "tokens": length,
        "hidden": config.hidden_size,
        "experts": config.num_experts,
        "topk": config.num_experts_per_tok,
    }


def _order(sizes: Sizes, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """A router's choice with popular experts and unpopular ones."""
    shape = (sizes["tokens"], sizes["experts"])
    likes = random_normal(shape[1:], torch.float32, device, seed + 8, 0.5)
    experts = torch.topk(random_normal(shape, torch.float32, device, seed + 9) + likes, sizes["topk"]).indices
    return ops.expert_order(experts, sizes["experts"])._asdict()


def _permute_workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    tokens, hidden, rows = sizes["tokens"], sizes["hidden"], sizes["tokens"] * sizes["topk"]
    return Workload(
        leaves={"x": random_normal((tokens, hidden), dtype, device, seed)},
        others=_order(sizes, device, seed),
        grads=(random_normal((rows, hidden), dtype, device, seed + 1),),
        shared=frozenset({"x", "rows"}),
    )


def _unpermute_workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    tokens, hidden, topk = sizes["tokens"], sizes["hidden"], sizes["topk"]
    weights = torch.softmax(random_normal((tokens, topk), torch.float32, device, seed + 2), dim=-1)
    return Workload(
        leaves={"rows": random_normal((tokens * topk, hidden), dtype, device, seed), "weights": weights},
        others=_order(sizes, device, seed),
        grads=(random_normal((tokens, hidden), dtype, device, seed + 1),),
        shared=frozenset({"rows", "weights", "z"}),
    )


def _permute_ours(x: torch.Tensor, **order: torch.Tensor) -> torch.Tensor:
    return ops.moe_permute(x, ops.ExpertOrder(**order))


def _permute_plain(x: torch.Tensor, source: torch.Tensor, positions: torch.Tensor, **_: Any) -> torch.Tensor:
    return x.index_select(0, source // positions.shape[1])


def _unpermute_ours(rows: torch.Tensor, weights: torch.Tensor, **order: torch.Tensor) -> torch.Tensor:
    return ops.moe_unpermute(rows, ops.ExpertOrder(**order), weights)


def _unpermute_plain(rows: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor, **_: Any) -> torch.Tensor:
    of_tokens = torch.unflatten(rows.index_select(0, positions.flatten()), 0, positions.shape)
    return (of_tokens * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def _permute_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """X in and rows out, or their gradients the other way, and an int64 per row that says where."""
    assert direction in ("forward", "backward"), direction
    rows = sizes["tokens"] * sizes["topk"]
    return element * (sizes["tokens"] + rows) * sizes["hidden"] + 8 * rows


def _unpermute_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Forward: rows, z, weights (fp32); backward: rows, dz, weights, d rows, d weights. An int64 per row each time."""
    tokens, hidden, rows = sizes["tokens"], sizes["hidden"], sizes["tokens"] * sizes["topk"]
    if direction == "forward":
        return element * (tokens + rows) * hidden + (4 + 8) * rows
    return element * (tokens + 2 * rows) * hidden + (4 + 4 + 8) * rows


def _permute_flops(sizes: Sizes, direction: str) -> int:
    """A gather has none; its gradient adds every row to a token's."""
    return {"forward": 0, "backward": 1}[direction] * sizes["tokens"] * sizes["topk"] * sizes["hidden"]


def _unpermute_flops(sizes: Sizes, direction: str) -> int:
    """Forward: a product and a sum per element of the rows; backward: a product, and a dot product for the weight."""
    return {"forward": 2, "backward": 3}[direction] * sizes["tokens"] * sizes["topk"] * sizes["hidden"]


_ODD = (
    {"tokens": 1, "hidden": 3, "experts": 2, "topk": 1},
    {"tokens": 67, "hidden": 129, "experts": 7, "topk": 3},
    {"tokens": 33, "hidden": 2048, "experts": 60, "topk": 4},
)
_LENGTHS = {"cuda": (8192, 32_768), "cpu": (256,)}
_MODELS = {"cuda": ("57b", "a2.7b"), "cpu": ("a2.7b",)}

CASES = (
    OpCase(
        name="moe_permute",
        family="moe",
        operation="moe_permute",
        about="rows of tokens into expert order",
        outputs=("rows",),
        sizes=_sizes,
        workload=_permute_workload,
        ours=_permute_ours,
        plain=_permute_plain,
        bytes_moved=_permute_bytes,
        flops=_permute_flops,
        odd_sizes=_ODD,
        lengths=_LENGTHS,
        models=_MODELS,
    ),
    OpCase(
        name="moe_unpermute",
        family="moe",
        operation="moe_permute",
        about="the weighted sum of each token's rows",
        outputs=("z",),
        sizes=_sizes,
        workload=_unpermute_workload,
        ours=_unpermute_ours,
        plain=_unpermute_plain,
        bytes_moved=_unpermute_bytes,
        flops=_unpermute_flops,
        odd_sizes=_ODD,
        lengths=_LENGTHS,
        models=_MODELS,
    ),
)
