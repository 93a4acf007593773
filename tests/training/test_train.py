"""A run as a user meets it: files, resume, refusals, signals, numbers that are not finite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_qwen.cli import train as train_command
from megatron_qwen.conversion import import_hf
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError, NumericsError, UnsafeInputError
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.recipes.pretrain import pretrain
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf
from megatron_qwen.training.metrics import read_metrics
from megatron_qwen.training.overrides import apply_overrides, load_recipe
from megatron_qwen.training.recipe import Recipe

FAST = [
    "model.seq_length=32",
    "schedule.micro_batch_size=4",
    "schedule.global_batch_size=16",
    "logging.tensorboard=false",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_qwen", "train", "pretrain", *arguments]


def options(corpus, out: str, *more: str) -> list[str]:
    changes = [part for each in FAST for part in ("--set", each)]
    return ["--data", corpus.prefix, "--tokenizer", corpus.tokenizer, "--out", out, *changes, *more]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), check=False, text=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A finished run of the command with --json, and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run(options(corpus, str(folder), "--steps", "6", "--eval-every", "3", "--lr", "1e-2", "--json"))
    assert result.returncode == 0, result.stderr
    return result, folder


def test_the_run_folder_holds_what_the_summary_says(finished, corpus):
    result, folder = finished
    summary = json.loads(result.stdout)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["last_loss"] < summary["first_loss"] - 0.3
    assert summary["valid_loss"] < summary["first_loss"]
    for name in ("checkpoint", "loss_curve", "metrics", "recipe"):
        assert Path(summary[name]).exists(), name
    assert len(read_metrics(folder / "metrics.jsonl")) == 6
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert "throughput per GPU (TFLOP/s/GPU)" in result.stderr
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.optimizer.lr == 1e-2
    assert recipe == load_recipe(folder / "iter_0000006" / "recipe.yaml")
    hf_config = json.loads((folder / "hf" / "config.json").read_text())
    assert hf_config["architectures"] == ["Qwen2ForCausalLM"]
    assert QwenTokenizer.load(folder / "hf").fingerprint() == QwenTokenizer.load(corpus.tokenizer).fingerprint()


def test_a_changed_recipe_is_not_resumed_in_silence(finished, corpus):
    _, folder = finished
    result = run(options(corpus, str(folder), "--steps", "6", "--eval-every", "3", "--lr", "1e-2", "--seed", "7"))
    assert result.returncode == 3, result.stderr
    assert "seed" in result.stderr
    assert "1234" in result.stderr
    assert "--allow-changed" in result.stderr


def test_dry_run_prints_the_full_recipe_and_starts_nothing(corpus, run_folder, tmp_path):
    result = run(options(corpus, run_folder, "--tp", "2", "--nproc", "2", "--dry-run"))
    assert result.returncode == 0, result.stderr
    (tmp_path / "printed.yaml").write_text(result.stdout)
    recipe = load_recipe(tmp_path / "printed.yaml")
    assert (recipe.parallel.tp, recipe.model.seq_length) == (2, 32)
    assert not Path(run_folder).exists()


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(corpus, run_folder):
    result = run(options(corpus, run_folder, "--tp", "3", "--pp", "3", "--nproc", "9"))
    assert result.returncode == 2
    assert "num_attention_heads" in result.stderr
    assert "num_layers" in result.stderr
    assert not Path(run_folder).exists()


def test_sigterm_saves_and_exits_130(corpus, run_folder):
    arguments = options(corpus, run_folder, "--steps", "100000", "--set", "schedule.style=constant")
    log = Path(run_folder).with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(*arguments), stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        metrics = Path(run_folder) / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == 130, log.read_text()
    finally:
        process.kill()
        process.wait()
    steps = read_metrics(metrics)
    assert (Path(run_folder) / f"iter_{len(steps):07d}" / "manifest.json").exists()
    assert json.loads((Path(run_folder) / "summary.json").read_text())["interrupted"]


def train_here(recipe: Recipe, *, allow_pickle: bool = False) -> tuple[int, str]:
    from megatron_qwen.training.loop import train

    try:
        return train(recipe, allow_pickle=allow_pickle).skipped_steps, ""
    except NumericsError as error:
        return -1, str(error)


def poisoned_folder(folder: Path, token: int | None) -> str:
    """Write a tiny model whose embedding is NaN for one token, or whose first norm is."""
    write_tiny_hf(folder, tiny_dense(vocab=320))
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight" if token is not None else "model.layers.0.input_layernorm.weight"
    weights[name][token or 0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def recipe_for(source: str, corpus, out: str, *changes: str) -> Recipe:
    recipe = pretrain(source, ((1.0, corpus.prefix),), out, tokenizer=corpus.tokenizer)
    return apply_overrides(recipe, ["model.dtype=fp32", "optimizer.lr=1e-4", *FAST, *changes])


@pytest.mark.multirank
def test_a_step_that_is_not_finite_is_applied_on_no_rank(corpus, tmp_path):
    """One token's embedding is NaN: steps that meet it, on whichever rank, change nothing; the others go on."""
    rare = QwenTokenizer.load(corpus.tokenizer).encode("q")[0]
    source = poisoned_folder(tmp_path / "model", rare)
    changes = ["schedule.steps=10", "parallel.dp=2", "checkpoint.save_at_end=false", "data.split=1,0,0"]
    results = run_ranks(train_here, 2, recipe_for(source, corpus, str(tmp_path / "run"), *changes), timeout=300)
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    skipped = [each["step"] for each in steps if not each["is_applied"]]
    assert results == [(len(skipped), "")] * 2
    assert 0 < len(skipped) < 10
    assert all(each["loss"] == each["loss"] for each in steps if each["is_applied"])


def refused_and_allowed(recipe: Recipe) -> tuple[int, str]:
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        train_here(recipe)
    return train_here(recipe, allow_pickle=True)


def test_a_run_from_rank_files_that_stays_non_finite_ends_with_its_batch(corpus, tmp_path):
    hf, source = poisoned_folder(tmp_path / "model", None), tmp_path / "ranks"
    import_hf(hf, source, progress=False, allow_nonfinite=True, ckpt_format="torch", layout=ParallelLayout(tp=2))
    recipe = recipe_for(str(source), corpus, str(tmp_path / "run"), "schedule.steps=10", "optimizer.max_bad_steps=2")
    [(skipped, message)] = run_ranks(refused_and_allowed, 1, recipe, timeout=300)
    assert skipped == -1
    assert "step 2" in message
    assert "samples 16 to 31" in message
    assert not list((tmp_path / "run").glob("iter_*"))


@pytest.mark.parametrize("flags", [(), ("--allow-pickle",)])
def test_the_command_says_whether_pickles_may_be_opened(corpus, tmp_path, monkeypatch, flags):
    import megatron_qwen.training.loop as loop

    class Reached(Exception):
        pass

    def train(recipe: Recipe, *, allow_pickle: bool, **others) -> None:
        raise Reached(allow_pickle)

    monkeypatch.setattr(loop, "train", train)
    app = typer.Typer()
    train_command.register(app)
    result = CliRunner().invoke(app, ["train", "pretrain", *options(corpus, str(tmp_path / "run"), *flags)])
    assert isinstance(result.exception, Reached), result.output
    assert result.exception.args == (bool(flags),)


def test_model_and_data_that_are_not_there(corpus, tmp_path):
    from megatron_qwen.training.source import resolve_source

    with pytest.raises(ConfigError, match="tokenizer"):
        resolve_source(pretrain("tiny", ((1.0, corpus.prefix),)))
    with pytest.raises(ConfigError, match=r"2\.5"):
        resolve_source(pretrain("qwen2.5-0.6b", ((1.0, corpus.prefix),), tokenizer=corpus.tokenizer))
    write_tiny_hf(tmp_path / "small", tiny_dense(vocab=100))
    with pytest.raises(ConfigError, match="embedding rows"):
        resolve_source(pretrain(str(tmp_path / "small"), ((1.0, corpus.prefix),), tokenizer=corpus.tokenizer))
