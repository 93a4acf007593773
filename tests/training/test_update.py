"""One pass over the gradients (tokens, clipping, Adam) and an embedding that adds to the buffer: as Megatron's own way.

Also: what this saves is really not done.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import update_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

MODELS = {"dense": tiny_dense(layers=2), "tied": tiny_dense(layers=2, tied=True), "moe": tiny_moe(layers=2)}
# Fewer than the gradient's norm, so that clipping takes part; more, so that it does not.
CLIPPED, FREE = ["optimizer.clip_grad=0.01"], ["optimizer.clip_grad=1e6"]
TWO_RANKS = {
    "dp2": ("tied", ParallelLayout(), ["optimizer.distributed=false", *CLIPPED]),
    "dp2 distributed": ("tied", ParallelLayout(), CLIPPED),
    "dp2 overlapped": ("dense", ParallelLayout(), ["performance.overlap_grad_reduce=true", *CLIPPED]),
    "dp2 overlapped tied": ("tied", ParallelLayout(), ["performance.overlap_grad_reduce=true", *CLIPPED]),
    "ep2": ("moe", ParallelLayout(ep=2), CLIPPED),
    "tp2": ("tied", ParallelLayout(tp=2), FREE),
    "tp2 sp": ("moe", ParallelLayout(tp=2, sequence_parallel=True), CLIPPED),
    "pp2 tied": ("tied", ParallelLayout(pp=2), CLIPPED),
}


def compare(found: dict[str, tuple[torch.Tensor, torch.Tensor]], where: str, tolerance: float) -> None:
    for name, (ours, megatrons) in found.items():
        scale = megatrons.float().norm().clamp_min(1e-12)
        error = float((ours.float() - megatrons.float()).norm() / scale)
        assert error <= tolerance, (where, name, error)
    assert float(found["norms"][0].max()) > 0, where


@pytest.mark.parametrize("settings", [CLIPPED, FREE], ids=["clipped", "free"])
@pytest.mark.parametrize("name", MODELS)
def test_one_rank(name: str, settings: list[str]) -> None:
    compare(update_ranks.both_ways(MODELS[name], ParallelLayout(), settings), name, 1e-5)


@pytest.mark.parametrize("buffers", ["true", "false"])
def test_master_weights_of_bf16(buffers: str) -> None:
    settings = ["model.dtype=bf16", f"performance.grad_reduce_in_fp32={buffers}", *CLIPPED]
    compare(update_ranks.both_ways(MODELS["tied"], ParallelLayout(), settings), buffers, 2e-2)


@pytest.mark.multirank
def test_two_ranks() -> None:
    cases = [(MODELS[model], layout, settings) for model, layout, settings in TWO_RANKS.values()]
    for results in run_ranks(update_ranks.steps_of_layouts, 2, cases):
        for where, found in zip(TWO_RANKS, results, strict=True):
            compare(found, where, 1e-5)


class Seen(TorchDispatchMode):
    """Lists the operations that run, and those that pass over as many numbers as the embedding has."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.names: list[str] = []
        self.whole: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        is_whole = isinstance(result, torch.Tensor) and result.dim() == 2 and result.size(0) == self.rows
        if is_whole and not any(word in str(function) for word in ("empty", "view", "detach", "t.default", "alias")):
            self.whole.append(str(function))
        return result


@pytest.mark.parametrize("name", ["dense", "tied"])
def test_backward_of_the_embedding_touches_only_the_rows_it_read(name: str) -> None:
    from megatron_qwen.model.build import build_model
    from megatron_qwen.training.optim import wrap_chunks
    from megatron_qwen.training.recipe import Recipe

    config = MODELS[name]
    groups.initialize(ParallelLayout())
    model = build_model(config, dtype=torch.float32, gradient_accumulation_fusion=True, calculate_per_token_loss=True)
    wrapped = wrap_chunks(Recipe(), [model])[0]
    tokens = torch.randint(0, config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    loss = wrapped(tokens, torch.arange(16)[None], None, labels=tokens.roll(-1, 1)).sum()
    with Seen(config.vocab_size) as seen:
        loss.backward()
    assert not any("embedding_dense_backward" in each for each in seen.names)
    # One GEMM of the output layer, and the rows of the embedding.
    assert sorted(set(seen.whole)) == ["aten.addmm_.default", "aten.index_add_.default"], seen.whole


def test_a_part_whose_step_raises_leaves_no_divisor_in_the_others() -> None:
    from megatron_qwen.parallel.adam import FusedLayoutAdam
    from megatron_qwen.training.optim import apply_update

    class Failing(FusedLayoutAdam):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            raise RuntimeError(f"divided by {self.gradient_divisor:g}")

    adams = Failing([torch.ones(2)]), FusedLayoutAdam([torch.ones(2)])
    parts = [SimpleNamespace(optimizer=each, config=SimpleNamespace(clip_grad=0.5)) for each in adams]
    chained = SimpleNamespace(chained_optimizers=parts, step_with_ready_grads=lambda: [each.step() for each in adams])
    with pytest.raises(RuntimeError, match="divided by 16"):
        apply_update(chained, 1.0 - 1e-6, num_tokens=8.0)
    assert [each.gradient_divisor for each in adams] == [1.0, 1.0]
