"""`megatron-qwen convert verify`: two checkpoints compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_qwen.errors import MismatchError

if TYPE_CHECKING:
    from megatron_qwen.conversion.comparison import VerifyReport

_JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON, without a progress bar.")]


def register(group: typer.Typer) -> None:
    """Add the verb `verify` to the group `convert`."""
    group.command("verify")(verify_command)


def verify_command(
    a: Annotated[Path, typer.Argument(help="Hugging Face or Megatron folder.")],
    b: Annotated[Path, typer.Argument(help="Hugging Face or Megatron folder.")],
    logits: Annotated[bool, typer.Option("--logits", help="Also run both on the same tokens, in fp32.")] = False,
    as_json: _JsonOption = False,
) -> None:
    """Compare two checkpoints bit for bit; exit code 3 if they differ."""
    from megatron_qwen.conversion.comparison import compare_logits, verify

    report = verify(a, b)
    outcome = compare_logits(a, b) if logits else None
    if as_json:
        content = {**report.to_json(), **({"logits": outcome.to_json()} if outcome else {})}
        typer.echo(json.dumps(content, indent=2))
    else:
        _print_differences(report)
        if outcome is not None:
            typer.echo(
                f"logits of {outcome.tokens} tokens: largest difference {outcome.max_abs:.3g}, "
                f"range {outcome.logit_range:.3g}"
            )
    if not report.is_equal or (outcome is not None and not outcome.is_equal):
        raise typer.Exit(MismatchError.exit_code)


def _print_differences(report: VerifyReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    size = f"{report.tensors:,} tensors, {report.weight_bytes / 1e6:,.1f} MB"
    if report.is_equal:
        console.print(f"equal to the last bit: {size}", markup=False)
        return
    table = Table(title=f"{len(report.differences):,} differences ({size} compared)")
    for column in ("tensor", "kind", "found in A and B", "values", "max |A-B|"):
        table.add_column(column, overflow="fold")
    for item in report.differences:
        table.add_row(item.name, item.kind, item.detail, f"{item.count:,}", f"{item.max_abs:.3g}")
    console.print(table)
