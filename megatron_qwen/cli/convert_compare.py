"""`megatron-qwen convert verify`: two checkpoints compared by weights, by running them, by the hashes of files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli import convert_upcycle
from megatron_qwen.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from megatron_qwen.conversion.comparison.advance import Advance
    from megatron_qwen.conversion.comparison.logits import LogitsReport
    from megatron_qwen.conversion.comparison.manifests import ManifestReport
    from megatron_qwen.conversion.comparison.weights import VerifyReport


def register(group: typer.Typer) -> None:
    """Add the verbs `verify` and `upcycle` to the group `convert`."""
    group.command("verify")(verify_command)
    convert_upcycle.register(group)


def verify_command(
    a: Annotated[Path, typer.Argument(help="Hugging Face or Megatron folder.")],
    b: Annotated[Path | None, typer.Argument(help="Likewise; may be left out with --manifest alone.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Every tensor, bit for bit (the default).")] = False,
    logits: Annotated[
        bool, typer.Option("--logits", help="Run both in fp32; name the first layer and module that differ.")
    ] = False,
    manifest: Annotated[bool, typer.Option("--manifest", help="Hash the files; compare with the manifests.")] = False,
    tokens: Annotated[int, typer.Option(help="--logits: length of the text.")] = 64,
    seed: Annotated[int, typer.Option(help="--logits: where the text begins, or of random ids.")] = 0,
    tolerance: Annotated[
        float | None,
        typer.Option(help="--logits: difference of a module, as a part of its range, that counts as equal."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="--logits: who runs A: megatron, or transformers for a Hugging Face folder.")
    ] = "megatron",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open pickle files, under an allow-list of plain classes.")
    ] = False,
    threads: Annotated[int, typer.Option(help="That read, compare and hash.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, without a progress bar.")] = False,
) -> None:
    """Compare two checkpoints of any format; exit code 3 if they differ."""
    weights = weights or not (logits or manifest)
    if b is None and (weights or logits):
        raise ConfigError("convert verify: the second folder is missing; only --manifest alone does without")
    from megatron_qwen.conversion.comparison.advance import silent
    from megatron_qwen.conversion.comparison.logits import compare_logits
    from megatron_qwen.conversion.comparison.manifests import compare_manifests
    from megatron_qwen.conversion.comparison.weights import verify

    progress = silent if as_json else _bar
    reports: dict[str, VerifyReport | ManifestReport | LogitsReport] = {}
    if manifest:
        folders = (a,) if b is None else (a, b)
        reports["manifest"] = found = compare_manifests(*folders, threads=threads, progress=progress)
        if not as_json:
            _print_files(found)
    if weights:
        assert b is not None
        reports["weights"] = compared = verify(a, b, threads=threads, allow_pickle=allow_pickle, progress=progress)
        if not as_json:
            _print_differences(compared)
    if logits:
        assert b is not None
        reports["logits"] = outcome = compare_logits(
            a,
            b,
            tokens=tokens,
            seed=seed,
            tolerance=tolerance,
            against=against,
            allow_pickle=allow_pickle,
            progress=progress,
        )
        if not as_json:
            _print_layers(outcome)
    is_equal = all(report.is_equal for report in reports.values())
    if as_json:
        content: dict[str, Any] = {name: report.to_json() for name, report in reports.items()}
        typer.echo(json.dumps({"is_equal": is_equal, **content}, indent=2))
    if not is_equal:
        raise typer.Exit(MismatchError.exit_code)


@contextmanager
def _bar(what: str, items: int, num_bytes: int) -> Iterator[Advance]:
    """Show on stderr what is done, with rate and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("verify"), BarColumn(), TextColumn("{task.fields[items]}" + f"/{items} {what}")]
    columns += [DownloadColumn(), TransferSpeedColumn()] if num_bytes else []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=num_bytes or items, items=0)

        def advance(items: int, num_bytes_done: int) -> None:
            done = bar.tasks[task].fields["items"] + items
            bar.update(task, advance=num_bytes_done if num_bytes else items, items=done)

        yield advance


def _print_differences(report: VerifyReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    size = f"{report.tensors:,} tensors, {report.weight_bytes / 1e6:,.1f} MB"
    if report.is_equal:
        console.print(f"weights: equal to the last bit: {size}", markup=False)
        return
    table = Table(title=f"{len(report.differences):,} differences ({size} compared)")
    for column in ("tensor", "kind", "found in A and B", "values", "max |A-B|"):
        table.add_column(column, overflow="fold")
    for item in report.differences:
        figures = (f"{item.count:,}", f"{item.max_abs:.3g}") if item.kind in ("values", "dtype") else ("", "")
        table.add_row(item.name, item.kind, item.detail, *figures)
    console.print(table)


def _print_files(report: ManifestReport) -> None:
    from rich.console import Console

    console = Console()
    size = f"{report.files:,} files, {report.num_bytes / 1e6:,.1f} MB"
    for folder in dict.fromkeys(str(Path(name).parent) for name in report.uncovered):
        names = [Path(name).name for name in report.uncovered if str(Path(name).parent) == folder]
        console.print(f"note: {folder}: no manifest covers {', '.join(names)}", markup=False, soft_wrap=True)
    if report.is_equal:
        text = f"manifest: every file is as {', '.join(report.manifests)} says: {size}"
        console.print(text, markup=False, soft_wrap=True)
        return
    console.print(f"{len(report.differences):,} files differ ({size} hashed)", markup=False)
    for item in report.differences:
        console.print(f"{item.kind}: {Path(item.folder) / item.name}", markup=False, soft_wrap=True)
        for where, side in (("manifest", item.expected), ("found", item.found)):
            if side is not None:
                console.print(f"  {where:8} {side.bytes:>15,} bytes  {side.sha256}", markup=False, soft_wrap=True)


def _print_layers(report: LogitsReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report.tokens} tokens of {'text' if report.text else 'random ids'}, A by {report.against}")
    for column in ("layer", "hidden state |A-B|/|A|", "worst module on equal input", "max |A-B|", "of range"):
        table.add_column(column, overflow="fold")
    for is_equal, group in itertools.groupby(
        report.layers, key=lambda row: row.hidden.max_abs == row.worst.max_abs == 0
    ):
        rows = list(group)
        if is_equal:
            first, last = rows[0].layer, rows[-1].layer
            table.add_row(str(first) if first == last else f"{first} to {last}", "0", "equal", "0", "")
            continue
        for row in rows:
            worst = row.worst
            figures = (f"{worst.max_abs:.3g}", f"{worst.value_range:.3g}") if worst.max_abs else ("0", "")
            name = worst.module if worst.max_abs else "equal"
            table.add_row(str(row.layer), f"{row.hidden.relative:.3g}", name, *figures)
    if report.layers:
        console.print(table)
        console.print(
            f"logits, each model by itself: max |A-B| {report.max_abs:.3g} of range {report.logit_range:.3g}; "
            f"the same next token for {report.same_top1} of {report.tokens}",
            markup=False,
            soft_wrap=True,
        )
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(report.verdict, markup=False, soft_wrap=True)
