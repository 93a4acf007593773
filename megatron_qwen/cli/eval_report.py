"""What the verbs of `eval` print and write: tables, JSON, charts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from megatron_qwen.cli.files import make_folder

if TYPE_CHECKING:
    from megatron_qwen.evaluation.passkey import PasskeyAnswer, PasskeyCase
    from megatron_qwen.evaluation.perplexity import WindowLoss
    from megatron_qwen.evaluation.sparse_calibration import HeadCalibration


def passkey_record(answers: Sequence[PasskeyAnswer], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what passkey.json says: the settings, shares of keys found by length and depth, every answer."""
    from megatron_qwen.evaluation.passkey import accuracy_table

    table = accuracy_table(answers)
    return {
        **settings,
        "found": {str(length): {str(depth): share for depth, share in row.items()} for length, row in table.items()},
        "answers": [_without_prompt(each.case) | {
            "answer": each.answer, "is_correct": each.is_correct, "seconds": round(each.seconds, 3)
        } for each in answers],
    }  # fmt: skip


def show_passkey(
    answers: Sequence[PasskeyAnswer], settings: dict[str, Any], out: Path | None, *, as_json: bool
) -> None:
    """Print the shares of keys found, and draw passkey.png."""
    from rich.table import Table

    from megatron_qwen.evaluation.passkey import accuracy_table
    from megatron_qwen.evaluation.plots import draw_heat_map

    table = accuracy_table(answers)
    shown = Table()
    shown.add_column("depth", justify="right")
    for length in table:
        shown.add_column(f"{length:,} tokens", justify="right")
    for depth in next(iter(table.values())):
        shown.add_row(f"{depth:g}", *(f"{row[depth]:.0%}" for row in table.values()))
    _print(passkey_record(answers, settings), f"Keys found: {_describe(settings)}", shown, as_json=as_json)
    if out is not None:
        draw_heat_map(table, out / "passkey.png", title=_describe(settings))


def _without_prompt(case: PasskeyCase) -> dict[str, Any]:
    values = dataclasses.asdict(case)
    del values["prompt"]  # as long as it says, and the same for the same seed
    return values


def show_perplexity(
    windows: dict[str, list[WindowLoss]],
    totals: dict[str, list[WindowLoss]],
    settings: dict[str, Any],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print losses by window and by length of every kind of attention; write perplexity.json and .png.

    Args:
        windows: name of the attention to its losses; a second one is what the first is compared with.
        totals: likewise, from the start of the text to each length.
        settings: of the run.
        out: folder, or None to write nothing.
        as_json: print JSON.
    """
    from rich.table import Table

    from megatron_qwen.evaluation.plots import draw_losses

    record = {
        **settings,
        "attention": {
            name: {
                "windows": [dataclasses.asdict(each) | {"perplexity": each.perplexity} for each in windows[name]],
                "lengths": [dataclasses.asdict(each) | {"perplexity": each.perplexity} for each in totals[name]],
            }
            for name in windows
        },
    }
    shown = Table()
    shown.add_column("tokens", justify="right")
    for name in windows:
        shown.add_column(name, justify="right")
    if len(windows) == 2:
        shown.add_column("difference", justify="right")
    for parts in (windows, totals):
        for row in zip(*parts.values(), strict=True):
            cells = [f"{each.loss:.4f}  {each.perplexity:.3f}" for each in row]
            difference = [f"{row[0].loss - row[1].loss:+.4f}"] if len(row) == 2 else []
            shown.add_row(f"{row[0].start:,} to {row[0].end:,}", *cells, *difference)
        shown.add_section()
    title = f"Loss (nats per token) and perplexity: {_describe(settings)}"
    _print(record, title, shown, as_json=as_json)
    write_record("perplexity", record, out)
    if out is not None:
        draw_losses(windows, out / "perplexity.png", title=_describe(settings))


def show_calibration(heads: Sequence[HeadCalibration], settings: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Print recall and budgets by layer; write sparse_attention_config.json, sparse_calibration.json and .png."""
    from rich.table import Table

    from megatron_qwen.checkpoint.atomic import storage_errors
    from megatron_qwen.evaluation.plots import draw_calibration
    from megatron_qwen.evaluation.sparse_calibration import as_config, by_layer
    from megatron_qwen.inference.sparse_prefill import CONFIG_FILE

    layers = by_layer(heads)
    shown = Table()
    for name in ("layer", "recall", "lowest head", "lowest piece", "columns", "diagonals", "pairs kept"):
        shown.add_column(name, justify="right")
    for name, those in [*((str(number), layer) for number, layer in enumerate(layers)), ("all", list(heads))]:
        shown.add_row(
            name,
            f"{_mean([each.recall for each in those]):.4f}",
            f"{min(each.recall for each in those):.4f}",
            f"{min(each.lowest_recall for each in those):.4f}",
            f"{_mean([each.verticals for each in those]):,.0f}",
            f"{_mean([each.slashes for each in those]):,.0f}",
            f"{_mean([each.kept for each in those]):.1%}",
            end_section=name == str(len(layers) - 1),
        )
    record = {
        **settings,
        "recall": _mean([each.recall for each in heads]),
        "lowest_recall": min(each.lowest_recall for each in heads),
        "kept": _mean([each.kept for each in heads]),
        "heads": [dataclasses.asdict(each) for each in heads],
    }
    write_record("sparse_calibration", record, out)
    with storage_errors(f"cannot write {out / CONFIG_FILE}"):
        as_config(heads).write(out / CONFIG_FILE)
    draw_calibration(
        layers, out / "sparse_calibration.png", title=f"{_describe(settings)}, {settings['length']:,} tokens"
    )
    _print(record, f"Sparse attention: {_describe(settings)}; wrote {out / CONFIG_FILE}", shown, as_json=as_json)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _describe(settings: dict[str, Any]) -> str:
    chunks = settings["dual_chunk_attention"]
    how = f"chunk {chunks['chunk_size']:,}, window {chunks['local_size']:,}" if chunks else "plain attention"
    if settings["sparse_prefill"]:
        how += f", sparse beyond {settings['sparse_prefill']['threshold']:,}"
    return f"{Path(settings['model']).resolve().name}, {settings['dtype']}, {how}"


def _print(record: dict[str, Any], title: str, table: Any, *, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, markup=False)
    console.print(title)
    console.print(table)


def write_record(name: str, record: dict[str, Any], out: Path | None) -> None:
    """Write a record as NAME.json into a folder, which is made; nothing without one.

    Raises:
        StorageError: it cannot be written.
    """
    from megatron_qwen.checkpoint.atomic import atomic_write_text

    if out is None:
        return
    make_folder(out)
    atomic_write_text(out / f"{name}.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
