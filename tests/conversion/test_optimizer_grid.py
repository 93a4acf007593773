"""Optimizer state over many layouts: there and back without Megatron, and stock optimizers on four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stock_optimizer as stock
import torch
from made_up_run import QUIET, load, rank_path, run_at

from megatron_qwen.conversion import reshard
from megatron_qwen.conversion.formats.legacy.layout import rank_files
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

TIED = tiny_dense(layers=4, vocab=132, hidden=72, ffn=56, tied=True)
ODD = tiny_dense(layers=4, vocab=131)
MOE = tiny_moe(layers=4, vocab=132)
MIXED = tiny_moe(layers=4, vocab=132, mlp_only_layers=(0, 2), expert_ffn=20)
DENSE_LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tp=4),
    ParallelLayout(pp=4),
    ParallelLayout(tp=2, pp=2, pp_layout=(1, 3)),
    ParallelLayout(pp=2, vpp=2),
    ParallelLayout(tp=2, pp=3, pp_layout=(2, 1, 1)),
]
MOE_LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(ep=4),
    ParallelLayout(tp=2, ep=2),
    ParallelLayout(tp=2, ep=2, etp=1),
    ParallelLayout(tp=4, ep=2, etp=2, pp=2),
    ParallelLayout(tp=2, etp=1, pp=2, vpp=2),
    ParallelLayout(ep=2, pp=3, pp_layout=(1, 1, 2)),
]
GRID = [
    *((config, layout) for config in (TIED, ODD) for layout in DENSE_LAYOUTS),
    *((config, layout) for config in (MOE, MIXED) for layout in MOE_LAYOUTS),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize(("config", "layout"), GRID)
def test_the_state_of_every_rank_comes_back_bit_for_bit(tmp_path, config, layout, distributed):
    start = ParallelLayout(ep=2) if config.is_moe else ParallelLayout(tp=2)
    first = run_at(tmp_path, config, start)
    there, back = tmp_path / "there", tmp_path / "back"
    reshard(first, tmp_path / "torch_dist", distributed_optimizer=distributed, verify=True, **QUIET)
    reshard(tmp_path / "torch_dist", there, ckpt_format="torch", layout=layout, verify=True, **QUIET)
    reshard(there, back, ckpt_format="torch", layout=start, distributed_optimizer=False, verify=True, **QUIET)
    for file in rank_files(config, start):
        one, other = (load(rank_path(run, file.folder)) for run in (first, back))
        assert leaves(one["optimizer"]) == leaves(other["optimizer"])


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return numbers by path, tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return {path: (value.shape, value.dtype, value.contiguous().numpy().tobytes())}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {key: leaf for name, each in items for key, leaf in leaves(each, f"{path}.{name}").items()}


STOCK: dict[str, tuple[QwenConfig, ParallelLayout, ParallelLayout, bool]] = {
    "tied": (TIED, ParallelLayout(tp=2, pp=2), ParallelLayout(pp=4), True),
    "dense_plain": (TIED, ParallelLayout(pp=2, vpp=2), ParallelLayout(tp=2, pp=2), False),
    "moe": (MOE, ParallelLayout(tp=2, ep=2), ParallelLayout(pp=2, ep=2), True),
    "moe_etp1": (MIXED, ParallelLayout(pp=2), ParallelLayout(tp=4, ep=4, etp=1), True),
    "moe_plain": (MIXED, ParallelLayout(tp=2, ep=4, etp=1), ParallelLayout(tp=2, pp=2), False),
}


def save_four(root: Path) -> None:
    for name, (config, layout, _, distributed) in STOCK.items():
        built = stock.build(config, layout, distributed=distributed)
        built.step(1)
        stock.save_torch_dist(built, root / name / "torch_dist", 1, distributed=distributed)
        stock.save_legacy(built, config, root / name / "legacy", 1, distributed=distributed)


def load_four(root: Path) -> dict[str, bool]:
    results = {}
    for name, (config, _, layout, distributed) in STOCK.items():
        snapshots = []
        for source, load_state in (("torch_dist", stock.load_torch_dist), ("out", stock.load_legacy)):
            built = stock.build(config, layout, distributed=distributed)
            load_state(built, root / name / source, 1, distributed=distributed)
            built.step(2)
            snapshots.append(built.snapshot())
        results[name] = stock.same(*snapshots)
    return results


@pytest.mark.exhaustive
@pytest.mark.multirank
def test_stock_optimizers_on_four_ranks_step_from_the_resharded_state(tmp_path):
    run_ranks(save_four, 4, tmp_path, timeout=500)
    for name, (config, _, layout, _) in STOCK.items():
        folder = tmp_path / name
        reshard(folder / "legacy", folder / "out", ckpt_format="torch", layout=layout, config=config, **QUIET)
    assert run_ranks(load_four, 4, tmp_path, timeout=500) == [dict.fromkeys(STOCK, True)] * 4
