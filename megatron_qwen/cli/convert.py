"""`megatron-qwen convert import|export|reshard`: checkpoints between Hugging Face and Megatron."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli import convert_compare
from megatron_qwen.cli.convert_options import (
    Config,
    DryRun,
    Dtype,
    Ep,
    Etp,
    Format,
    Impl,
    Json,
    MaxMemory,
    Nonfinite,
    Overwrite,
    Pickle,
    Pp,
    PpLayout,
    Resume,
    ShardSize,
    Step,
    Threads,
    Tp,
    Verify,
    Vpp,
    conversion_options,
)
from megatron_qwen.errors import Interrupted

if TYPE_CHECKING:
    from megatron_qwen.conversion.run import Conversion


def register(app: typer.Typer) -> None:
    """Add the verbs of `convert`."""
    group = typer.Typer(help="Convert and compare checkpoints.", no_args_is_help=True)
    group.command("import")(import_command)
    group.command("export")(export_command)
    group.command("reshard")(reshard_command)
    convert_compare.register(group)
    app.add_typer(group, name="convert")


def import_command(
    context: typer.Context,
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and safetensors.")],
    out: Annotated[Path, typer.Argument(help="Megatron folder to make.")],
    ckpt_format: Format = "torch_dist",
    tp: Tp = None,
    pp: Pp = None,
    pp_layout: PpLayout = None,
    vpp: Vpp = None,
    ep: Ep = None,
    etp: Etp = None,
    transformer_impl: Impl = "local",
    dtype: Dtype = None,
    dry_run: DryRun = False,
    verify: Verify = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_nonfinite: Nonfinite = False,
    allow_pickle: Pickle = False,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint in OUT/release."""
    from megatron_qwen.conversion.run import prepare_import

    conversion = prepare_import(hf_dir, out, **conversion_options(context.params))
    run_conversion(conversion, is_dry=dry_run, as_json=as_json)


def export_command(
    context: typer.Context,
    megatron_dir: Annotated[Path, typer.Argument(help="Megatron folder: an import, a run, or one step.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make.")],
    step: Step = None,
    config: Config = None,
    max_shard_size: ShardSize = "50GB",
    dtype: Dtype = None,
    dry_run: DryRun = False,
    verify: Verify = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_nonfinite: Nonfinite = False,
    allow_pickle: Pickle = False,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Convert the weights of a Megatron checkpoint to a Hugging Face folder."""
    from megatron_qwen.conversion.run import prepare_export

    conversion = prepare_export(
        megatron_dir, out, step=step, config=_read_config(config), **conversion_options(context.params)
    )
    run_conversion(conversion, is_dry=dry_run, as_json=as_json)


def reshard_command(
    context: typer.Context,
    in_dir: Annotated[Path, typer.Argument(help="Megatron folder: an import, a run, or one step.")],
    out: Annotated[Path, typer.Argument(help="Megatron folder to make.")],
    ckpt_format: Format = "torch_dist",
    tp: Tp = None,
    pp: Pp = None,
    pp_layout: PpLayout = None,
    vpp: Vpp = None,
    ep: Ep = None,
    etp: Etp = None,
    transformer_impl: Impl = "local",
    step: Step = None,
    config: Config = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer/--no-optimizer", help="Carry the optimizer state, where there is one.")
    ] = True,
    distributed_optimizer: Annotated[
        bool | None,
        typer.Option(
            "--distributed-optimizer/--no-distributed-optimizer",
            help="Kind of the optimizer that goes on; default: that of the run.",
        ),
    ] = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    verify: Verify = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_nonfinite: Nonfinite = False,
    allow_pickle: Pickle = False,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Convert a Megatron checkpoint to another format or layout, so that a run can go on there."""
    from megatron_qwen.conversion.run import prepare_reshard

    conversion = prepare_reshard(
        in_dir, out, step=step, config=_read_config(config), **conversion_options(context.params)
    )
    run_conversion(conversion, is_dry=dry_run, as_json=as_json)


def _read_config(path: Path | None) -> Any:
    from megatron_qwen.model.config import QwenConfig

    return None if path is None else QwenConfig.from_hf(path)


def run_conversion(conversion: Conversion, *, is_dry: bool, as_json: bool) -> None:
    """Run a conversion, or say what it would do, and print the report."""
    from megatron_qwen.cli.convert_tables import print_conversion, print_dry_run

    if is_dry:
        plan = conversion.dry_run()
        typer.echo(json.dumps(plan.to_json(), indent=2)) if as_json else print_dry_run(plan)
        return
    try:
        report = conversion.run()
    except Interrupted as error:
        arguments = [*sys.argv[1:], *(() if "--resume" in sys.argv else ("--resume",))]
        raise Interrupted(f"{error}:\n  {shlex.join(['megatron-qwen', *arguments])}") from None
    typer.echo(json.dumps(report.to_json(), indent=2)) if as_json else print_conversion(report)
