"""`linear_cross_entropy` with the vocabulary in parts, over two gloo ranks, against one rank."""

from __future__ import annotations

from typing import Any

import linear_cross_entropy_checks as checks
import pytest
import torch

from megatron_qwen.testing.ranks import run_ranks

# Tokens as [S, B], hidden size, rows of all ranks, and those of them that count.
CASES: list[tuple[tuple[int, int], int, int, int]] = [
    ((4, 3), 16, 38, 37),
    ((2, 1), 8, 12, 5),  # the second rank has padding only
    ((6, 2), 24, 64, 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def on_a_rank() -> dict[str, Any]:
    """Return the errors of every case, by what was compared."""
    import torch.distributed as dist

    from megatron_qwen.errors import ConfigError
    from megatron_qwen.kernels.linear_cross_entropy import reference

    dist.init_process_group("gloo")
    reference.CHUNK_ELEMENTS, reference.SMALLEST_CHUNK = 64, 4
    found = {
        f"{lead} {rows} {vocab} {dtype} {'split' if splits else 'whole'}": compare(
            lead, size, rows, vocab, dtype, splits
        )
        for lead, size, rows, vocab in CASES
        for dtype in DTYPES
        for splits in (False, True)
    }
    try:
        compare((4, 3), 16, 38, 37, torch.float32, False, label=37)
    except ConfigError as error:
        found["refused"] = str(error)
    return found


def compare(
    lead: tuple[int, int], size: int, rows: int, vocab: int, dtype: torch.dtype, splits: bool, label: int | None = None
) -> dict[str, float]:
    """Return the relative errors of loss and gradients against the plain path on one rank, in float64."""
    import torch.distributed as dist

    from megatron_qwen import ops

    rank, ranks = dist.get_rank(), dist.get_world_size()
    (hidden, weight), labels, (grad,) = checks.example(lead, size, rows, vocab, dtype)
    exact_hidden, exact_weight = (each.double().clone().requires_grad_() for each in (hidden, weight))
    exact = checks.plain(exact_hidden, exact_weight, labels, vocab, 0.01)
    exact.backward(grad.double())
    if label is not None:
        labels[0, 0] = label
    part = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
    tokens = slice(rank * lead[0] // ranks, (rank + 1) * lead[0] // ranks) if splits else slice(None)
    mine, held = hidden[tokens].clone().requires_grad_(), weight[part].clone().requires_grad_()
    loss = ops.linear_cross_entropy(
        mine, held, labels, vocab_size=vocab, z_loss=0.01, group=dist.group.WORLD, sequence_parallel=splits
    )
    loss.backward(grad)
    pairs = {
        "loss": (loss, exact),
        "hidden": (mine.grad, exact_hidden.grad[tokens]),
        "weight": (held.grad, exact_weight.grad[part]),
    }
    return {
        name: float((a.detach().double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for name, (a, b) in pairs.items()
    }


@pytest.mark.multirank
def test_two_ranks_have_the_loss_and_gradients_of_one() -> None:
    tolerance = {"torch.float32": 2e-6, "torch.bfloat16": 2e-2, "torch.float64": 1e-14}
    for found in run_ranks(on_a_rank, 2):
        assert "labels holds 37 (1 such labels); expected 0 to 36" in found.pop("refused")
        assert len(found) == len(CASES) * len(DTYPES) * 2
        for case, errors in found.items():
            assert max(errors.values()) <= tolerance[case.split()[-2]], (case, errors)
