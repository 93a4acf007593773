from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.cli.app import build_app
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError, QwenError
from megatron_qwen.evaluation import sparse_calibration as calibration
from megatron_qwen.evaluation.sparse_calibration import HeadCalibration, kept_pairs
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.sparse_prefill import CONFIG_FILE
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf

SOURCE = Path(__file__)
LAYERS, HEADS, LENGTH = 2, 4, 260


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = write_tiny_hf(tmp_path_factory.mktemp("model"), tiny_dense(layers=LAYERS), seed=5)
    QwenTokenizer.train([SOURCE.read_text()] * 3, 300).save(target, style="chat")
    return target


@pytest.fixture(autouse=True)
def _leave_groups() -> Iterator[None]:
    yield
    groups.shutdown()


def uniform(verticals: int, slashes: int) -> ops.SparseAttentionConfig:
    return calibration.uniform_budgets(LAYERS, HEADS, verticals=verticals, slashes=slashes)


def test_every_head_reaches_the_recall_asked_for_in_every_piece(folder: Path, tmp_path: Path) -> None:
    groups.initialize(ParallelLayout())
    engine = Engine.load(folder, chunk_size=128, local_size=28, prefill_chunk_size=90)
    texts = [engine.tokenizer.encode(SOURCE.read_text())[start : start + LENGTH] for start in (0, 300)]

    def found(recall: float, **options: Any) -> list[HeadCalibration]:
        refinement = ops.Refinement(recall, vertical_step=20, slash_step=10)
        return calibration.calibrate(engine, texts, uniform(31, 50), refinement, last_rows=16, **options)

    before, calls = found(0.01), []
    after = found(0.9, on_call=lambda: calls.append(1))
    assert len(calls) == 2 * 2 * engine.observations(LENGTH) == 2 * 2 * LAYERS * 3
    places = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    assert [(each.layer, each.head) for each in before] == [(each.layer, each.head) for each in after] == places
    assert all((each.verticals, each.slashes) == (31, 50) for each in before)
    assert max(each.lowest_recall for each in before) < 0.9 <= min(each.lowest_recall for each in after)
    for one, other in zip(before, after, strict=True):
        steps = (other.verticals - 31) // 20
        assert steps > 0
        assert (other.verticals, other.slashes) == (31 + 20 * steps, 50 + 10 * steps)
        assert 0 < one.kept < other.kept < 1
        assert other.lowest_recall <= other.recall <= 1
    calibration.as_config(after).write(tmp_path / CONFIG_FILE)
    read = ops.SparseAttentionConfig.read(tmp_path / CONFIG_FILE, num_layers=LAYERS, num_heads=HEADS)
    assert read == calibration.as_config(after)
    assert read.layers[1][3].score == after[-1].recall
    # Of what it needs already, a head gets no more.
    again = calibration.calibrate(engine, texts, read, ops.Refinement(0.9, 20, 10), last_rows=16)
    assert again == after


def test_kept_pairs_are_counted_once() -> None:
    slashes = [torch.tensor([[0, 3], [7, 11], [30, 40]]), torch.tensor([[5, 6]]), torch.zeros(0, 2, dtype=torch.int32)]
    verticals = [torch.tensor([0, 1, 9, 25, 33]), torch.tensor([], dtype=torch.int32), torch.arange(40)]
    index = ops.SparseIndex.of_heads(40, verticals, slashes)
    for first, last in ((0, 40), (13, 40), (39, 40), (8, 33)):
        rows, columns = torch.arange(first, last), torch.arange(last)
        for head in range(3):
            assert kept_pairs(index, head, first, last) == int(index.kept(head, rows, columns).sum()), (first, head)


def command(*arguments: Any) -> None:
    build_app()(["eval", *map(str, arguments)], standalone_mode=False)


def test_the_command_writes_what_prefill_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    sizes = ("--dca-chunk-size", 128, "--prefill-chunk-size", 90, "--text", SOURCE)
    begin = ("--verticals", 31, "--slashes", 50, "--vertical-step", 40, "--slash-step", 40)
    command("sparse-calibration", folder, *sizes, *begin, "--length", LENGTH, "--recall", 0.8, "--out", out)
    shown = capsys.readouterr()
    assert "diagonals" in shown.out
    assert f"{2 * LAYERS * 3}/{2 * LAYERS * 3}" in shown.err
    assert (out / "sparse_calibration.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "sparse_calibration.json").read_text())
    assert record["wanted_recall"] == 0.8 <= record["lowest_recall"] <= record["recall"]
    assert record["dual_chunk_attention"]["chunk_size"] == 128
    budgets = ops.SparseAttentionConfig.read(out / CONFIG_FILE, num_layers=LAYERS, num_heads=HEADS)
    assert [dataclasses.asdict(each) for layer in budgets.layers for each in layer] == [
        {"verticals": each["verticals"], "slashes": each["slashes"], "score": each["recall"]}
        for each in record["heads"]
    ]
    # Budgets to begin with: those found are enough for the same recall, and stay.
    command("sparse-calibration", folder, *sizes, "--length", LENGTH, "--recall", 0.8, "--out", tmp_path / "again",
            "--sparse-attention-config", out / CONFIG_FILE, "--json")  # fmt: skip
    assert json.loads(capsys.readouterr().out)["heads"] == record["heads"]
    sparse = ("--sparse-attention-config", out / CONFIG_FILE, "--sparse-attention-threshold", 100)
    command("perplexity", folder, *sizes, *sparse, "--lengths", LENGTH, "--window", 64, "--against-dense", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["sparse_prefill"] == {"threshold": 100, "last_q": 64}
    kept, dense = (answer["attention"][f"{name}dual chunk attention"]["windows"] for name in ("sparse ", ""))
    assert kept[0]["loss"] == pytest.approx(dense[0]["loss"], abs=1e-5)
    assert kept[-1]["loss"] != pytest.approx(dense[-1]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--length", 200), "the longest text has 200 tokens, and every head begins with 6,096 columns or diagonals"),
        (("--length", 300), "--length 300: the text has 299 tokens; the model has 256 positions"),
        (("--recall", 1), "threshold is 1.0"),
        (("--slash-step", 0), "slash_step 0"),
        (("--verticals", 0), "verticals is 0"),
        (
            ("--verticals", 30, "--vertical-step", 99),
            "30 columns, of which prefill makes 130.*step of 99 would take some",
        ),
        (("--length", 99999), "Give a longer text"),
        (("--sparse-prefill", "on"), "calibration reads densely"),
        (("--sparse-attention-config", "x.json"), "leave --verticals, --slashes out"),
    ],
)
def test_calibrations_that_cannot_be(folder: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str) -> None:
    small = () if arguments == ("--length", 200) else ("--verticals", 31, "--slashes", 50)
    with pytest.raises(QwenError, match=message):
        command("sparse-calibration", folder, "--text", SOURCE, "--out", tmp_path, "--length", 200, *small, *arguments)
    assert not list(tmp_path.iterdir())


def test_against_dense_needs_something_sparse(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--against-dense: prefill of 199 tokens is dense without it"):
        command("perplexity", folder, "--text", SOURCE, "--lengths", 200, "--against-dense")
    with pytest.raises(ConfigError, match="no text"):
        calibration.check([], uniform(1, 1), ops.Refinement(0.9))
