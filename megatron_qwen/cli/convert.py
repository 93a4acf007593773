"""`megatron-qwen convert import|export|verify`: checkpoints between Hugging Face and Megatron."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_qwen.cli import convert_compare
from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.conversion.run import ConversionReport

_DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: that of each tensor in the input.")
]
_OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
_NonfiniteOption = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Convert NaN and infinity instead of refusing.")
]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON, without a progress bar.")]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def register(app: typer.Typer) -> None:
    """Add the verbs `convert import`, `convert export` and `convert verify`."""
    group = typer.Typer(help="Convert and compare checkpoints.", no_args_is_help=True)
    group.command("import")(import_command)
    group.command("export")(export_command)
    convert_compare.register(group)
    app.add_typer(group, name="convert")


def import_command(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and safetensors.")],
    out: Annotated[Path, typer.Argument(help="Megatron folder to make.")],
    dtype: _DtypeOption = None,
    overwrite: _OverwriteOption = False,
    allow_nonfinite: _NonfiniteOption = False,
    as_json: _JsonOption = False,
) -> None:
    """Convert a Hugging Face folder to a Megatron torch_dist checkpoint in OUT/release."""
    from megatron_qwen.conversion.run import import_hf

    report = import_hf(
        hf_dir, out, dtype=dtype, overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=not as_json
    )
    _print_conversion(report, as_json)


def export_command(
    megatron_dir: Annotated[Path, typer.Argument(help="Megatron folder: an import, a run, or one step.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make.")],
    step: Annotated[int | None, typer.Option(help="Step of a run; default: the latest.")] = None,
    dtype: _DtypeOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB or 500MB.")] = "50GB",
    config: Annotated[
        Path | None, typer.Option(help="config.json or Hugging Face folder, for a checkpoint without hf/config.json.")
    ] = None,
    overwrite: _OverwriteOption = False,
    allow_nonfinite: _NonfiniteOption = False,
    as_json: _JsonOption = False,
) -> None:
    """Convert the weights of a Megatron torch_dist checkpoint to a Hugging Face folder."""
    from megatron_qwen.conversion.run import export_hf
    from megatron_qwen.model.config import QwenConfig

    report = export_hf(
        megatron_dir,
        out,
        step=step,
        dtype=dtype,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        progress=not as_json,
        max_shard_bytes=parse_size(max_shard_size),
        config=None if config is None else QwenConfig.from_hf(config),
    )
    _print_conversion(report, as_json)


def parse_size(text: str) -> int:
    """Read "5GB", "500MB" or a number of bytes; units are decimal, as in `save_pretrained`.

    Raises:
        ConfigError: something else, or zero.
    """
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text.strip().upper())
    if match is None or int(match.group(1)) == 0:
        raise ConfigError(f"--max-shard-size: got {text!r}, expected a size such as 5GB or 500MB")
    return int(match.group(1)) * _UNITS[match.group(2)]


def _print_conversion(report: ConversionReport, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=report.direction, show_header=False)
    rows = {
        "from": report.source,
        "to": report.target,
        "tensors": f"{report.tensors:,}",
        "weights": f"{report.weight_bytes / 1e6:,.1f} MB, {report.dtype}",
        "time": f"{report.seconds:.2f} s, {report.megabytes_per_second:,.0f} MB/s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
