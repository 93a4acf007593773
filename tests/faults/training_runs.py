"""Small pre-training runs for the resume tests, on ranks forked from a warm server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qwen.checkpoint.store import CheckpointStore
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.data.writer import DatasetWriter
from megatron_qwen.testing import failpoints
from megatron_qwen.testing.forked import Outcome

SEQ_LENGTH = 32
BATCH = 4
STEPS = 6
EPOCH_END = 5
"""The corpus has 20 samples, so step 5 ends the first epoch, steps before are in its middle."""

TIMINGS = ("seconds", "tokens_per_second", "tflops", "mfu")


def write_data(folder: Path, *, seed: int = 0) -> Path:
    """Write `tok/` and `corpus.bin/.idx` with EPOCH_END * BATCH samples of SEQ_LENGTH tokens."""
    tokenizer = QwenTokenizer.train(["the quick brown fox jumps over the lazy dog " * 4], 290)
    tokenizer.save(folder / "tok")
    generator = np.random.default_rng(seed)
    total = EPOCH_END * BATCH * SEQ_LENGTH + 1
    cuts = np.sort(generator.choice(np.arange(5, total - 5), size=12, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [total]]))
    ids = np.minimum(generator.zipf(1.3, size=total), 200).astype(np.int64)
    ids[np.cumsum(lengths) - 1] = tokenizer.eod_id
    with DatasetWriter(folder / "corpus", vocab_size=tokenizer.vocab_size) as writer:
        writer.add(ids, lengths)
        writer.commit({"tokenizer": tokenizer.fingerprint()})
    return folder


def options(data: Path, out: Path, **layout: Any) -> dict[str, Any]:
    """Recipe values of a run with accumulation and dropout; `layout` are fields of ParallelRecipe."""
    return {
        "out": str(out),
        "model": {
            "source": "tiny",
            "seq_length": SEQ_LENGTH,
            "dtype": "bf16",
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": {
            "blend": [[1.0, str(data / "corpus")]],
            "tokenizer": str(data / "tok"),
            "split": "100,0,0",
            "cache_dir": str(out / "cache"),
        },
        "parallel": layout,
        "schedule": {"steps": STEPS, "micro_batch_size": 1, "global_batch_size": BATCH, "warmup_steps": 2},
        "checkpoint": {"save_every": 2},
        "logging": {"tensorboard": False},
    }


def recipe_of(values: Mapping[str, Any]) -> Any:
    from megatron_qwen.recipes import pretrain as recipes
    from megatron_qwen.training.overrides import recipe_from_dict

    return recipe_from_dict(values, recipes.pretrain(values["model"]["source"]))


def train(values: Mapping[str, Any], armed: str | None = None, kill_at: int | None = None, **arguments: Any) -> Any:
    """Train on this rank; `armed` is a fail point, `kill_at` the step after which rank 0 kills itself."""
    from megatron_qwen.training import loop

    def echo(line: str) -> None:
        if kill_at is not None and line.startswith(f"iteration {kill_at:>6}/"):
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.arm(armed)
    return loop.train(recipe_of(values), echo=echo, **arguments).to_dict()


def reshard(values: Mapping[str, Any], original: Path) -> tuple[list[str], dict[str, Any], list[str]]:
    """Go on at the layout of `values`, here of one rank: load, save the step again at once, compare, train on.

    Returns:
        Tensors that differ between the step as it was saved and `original`; the summary; the lines of the loop.
    """
    from megatron_qwen.parallel import groups
    from megatron_qwen.signals import StopRequest
    from megatron_qwen.training.identity import run_identity
    from megatron_qwen.training.loop import Run
    from megatron_qwen.training.source import resolve_source

    recipe = recipe_of(values)
    source = resolve_source(recipe)
    layout = groups.initialize(recipe.parallel.layout(), seed=recipe.seed)
    store = CheckpointStore(Path(recipe.out))
    lines: list[str] = []
    run = Run(recipe, source, layout, store, run_identity(recipe, source), lines.append)
    with store.lock(), StopRequest() as stop_request:
        run.start(resume=True, allow_changed=())
        run.saved_step = None
        run._save()
        differing = differing_tensors(store.step_folder(run.step), original)
        return differing, run.run(stop_request, None).to_dict(), lines


def try_changes(values: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Exception | None]:
    """Resume with each change of the recipe in turn; return what each raised. Nothing is trained on the way."""
    raised: dict[str, Exception | None] = {}
    for name, change in changes.items():
        changed = dict(values)
        for group, fields in change.items():
            changed[group] = {**values.get(group, {}), **fields} if isinstance(fields, dict) else fields
        try:
            train(changed)
        except ValueError as error:
            raised[name] = error
        else:
            raised[name] = None
    return raised


def compare_steps(left: Path, right: Path) -> list[str]:
    """Return the names of tensors that differ in a bit between two steps: weights, master weights, moments."""
    import torch

    torch.distributed.init_process_group("gloo")
    return differing_tensors(left, right)


def differing_tensors(left: Path, right: Path) -> list[str]:
    """As `compare_steps`, in a process group that is there."""
    import torch
    from megatron.core import dist_checkpointing

    one, other = (
        {
            name: value
            for name, value in dist_checkpointing.load_plain_tensors(str(folder)).items()
            if torch.is_tensor(value)
        }
        for folder in (left, right)
    )
    assert len(one) > 20
    differing = [name for name in one if name not in other or not torch.equal(one[name], other[name])]
    return sorted({*differing, *(set(other) - set(one))})


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the steps of metrics.jsonl without the timings."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


def results(outcomes: list[Outcome]) -> list[Any]:
    """Return what the ranks returned, or raise what the first failed one raised."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes
    return [outcome.result for outcome in outcomes]
