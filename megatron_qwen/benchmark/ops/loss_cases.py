"""The output layer and its loss: cross-entropy of hidden states against the vocabulary, summed over the tokens.

Shapes: T tokens, H hidden, V rows of the vocabulary; hidden [T, H], weight [V, H], labels [T].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function, OpCase, Sizes, Workload, random_normal
from megatron_qwen.model.config import QwenConfig

IGNORED = -100


def _sizes(config: QwenConfig, length: int) -> dict[str, int]:
    return {"tokens": length, "hidden": config.hidden_size, "vocab": config.vocab_size}


def _workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    tokens, hidden, vocab = sizes["tokens"], sizes["hidden"], sizes["vocab"]
    generator = torch.Generator(device).manual_seed(seed + 2)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    labels[3::7] = IGNORED
    return Workload(
        leaves={
            "hidden": random_normal((tokens, hidden), dtype, device, seed),
            # Logits of about 2: a softmax neither flat nor of one word.
            "weight": random_normal((vocab, hidden), dtype, device, seed + 1, 2.0 * hidden**-0.5),
        },
        others={"labels": labels},
        grads=(torch.tensor(1.0 / tokens, device=device),),
        shared=frozenset({"weight", "loss"}),
    )


def _ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ops.linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED).sum()


def _plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")


def _liger() -> Function:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Any:
        # No bias, no class weights, no z-loss, no label smoothing; reduced, it computes gradients in its forward.
        apply = LigerFusedLinearCrossEntropyFunction.apply
        return apply(hidden, weight, labels, None, None, IGNORED, 0.0, 0.0, "sum")[0]

    return run


def _bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Hidden states, weight and both gradients; labels (8 bytes). The logits are what need not be moved."""
    assert direction == "both", direction
    tokens, hidden, vocab = sizes["tokens"], sizes["hidden"], sizes["vocab"]
    return element * 2 * (tokens + vocab) * hidden + 8 * tokens


def _flops(sizes: Sizes, direction: str) -> int:
    """Three products of T, H and V: logits, and the gradients of hidden states and weight."""
    assert direction == "both", direction
    return 6 * sizes["tokens"] * sizes["hidden"] * sizes["vocab"]


CASES = (
    OpCase(
        name="linear_cross_entropy",
        family="loss",
        operation="linear_cross_entropy",
        about="output layer and loss, forward and backward, without the logits",
        outputs=("loss",),
        directions=("both",),
        bound="compute",
        sizes=_sizes,
        workload=_workload,
        ours=_ours,
        plain=_plain,
        peers={"liger": _liger},
        bytes_moved=_bytes,
        flops=_flops,
        odd_sizes=(
            {"tokens": 1, "hidden": 8, "vocab": 3},
            {"tokens": 7, "hidden": 65, "vocab": 131},
            {"tokens": 131, "hidden": 96, "vocab": 1031},
        ),
        lengths={"cuda": (8192,), "cpu": (32,)},
    ),
)
