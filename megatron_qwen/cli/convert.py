"""`megatron-qwen convert import|export|reshard`: checkpoints between Hugging Face and Megatron."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli import convert_compare
from megatron_qwen.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from megatron_qwen.conversion.run import Conversion
    from megatron_qwen.parallel.layout import ParallelLayout

_LAYOUT, _RUNNING = "Layout of per-rank files (--ckpt-format torch)", "Running"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_Format = Annotated[str, typer.Option("--ckpt-format", help="torch_dist: loads at any layout; torch: per-rank files.")]
_Tp = Annotated[
    int | None,
    typer.Option("--tp", "--tensor-model-parallel-size", help="Tensor parallel size.", rich_help_panel=_LAYOUT),
]
_Pp = Annotated[
    int | None,
    typer.Option("--pp", "--pipeline-model-parallel-size", help="Pipeline parallel size.", rich_help_panel=_LAYOUT),
]
_PpLayout = Annotated[
    str | None, typer.Option("--pp-layout", help="Layers of each stage, such as 6,8,8,6.", rich_help_panel=_LAYOUT)
]
_Vpp = Annotated[
    int | None,
    typer.Option(
        "--vpp",
        "--num-virtual-stages-per-pipeline-rank",
        help="Virtual stages per pipeline rank.",
        rich_help_panel=_LAYOUT,
    ),
]
_Ep = Annotated[
    int | None,
    typer.Option("--ep", "--expert-model-parallel-size", help="Expert parallel size.", rich_help_panel=_LAYOUT),
]
_Etp = Annotated[
    int | None,
    typer.Option(
        "--etp",
        "--expert-tensor-parallel-size",
        help="Tensor parallel size of experts; default: tp",
        rich_help_panel=_LAYOUT,
    ),
]
_Impl = Annotated[
    str,
    typer.Option(
        "--transformer-impl",
        help="Names in per-rank files: local, or transformer_engine.",
        rich_help_panel=_LAYOUT,
    ),
]
_Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: that of each tensor in the input.")
]
_ShardSize = Annotated[str, typer.Option(help="Largest file, such as 5GB or 500MB.")]
_Step = Annotated[int | None, typer.Option(help="Step of a run; default: the latest.")]
_Config = Annotated[
    Path | None, typer.Option(help="config.json or Hugging Face folder, for a checkpoint without hf/config.json.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Prove the plan from headers and print it; write nothing.")]
_Verify = Annotated[
    bool, typer.Option("--verify", help="Read the output again and compare it bit for bit before it gets its name.")
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted conversion left beside OUT.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
_Nonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Convert NaN and infinity instead of refusing.")]
_Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open pickle files of the input, under an allow-list of plain classes.")
]
_MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for tensors at work, such as 500MB; default: some 4 MiB slices.", rich_help_panel=_RUNNING
    ),
]
_Threads = Annotated[
    int | None, typer.Option(help="Threads that write; default: the processor cores, 2 to 8.", rich_help_panel=_RUNNING)
]
_Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON, without a progress bar.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of `convert`."""
    group = typer.Typer(help="Convert and compare checkpoints.", no_args_is_help=True)
    group.command("import")(import_command)
    group.command("export")(export_command)
    group.command("reshard")(reshard_command)
    convert_compare.register(group)
    app.add_typer(group, name="convert")


def import_command(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and safetensors.")],
    out: Annotated[Path, typer.Argument(help="Megatron folder to make.")],
    ckpt_format: _Format = "torch_dist",
    tp: _Tp = None,
    pp: _Pp = None,
    pp_layout: _PpLayout = None,
    vpp: _Vpp = None,
    ep: _Ep = None,
    etp: _Etp = None,
    transformer_impl: _Impl = "local",
    dtype: _Dtype = None,
    dry_run: _DryRun = False,
    verify: _Verify = False,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    allow_nonfinite: _Nonfinite = False,
    allow_pickle: _Pickle = False,
    max_memory: _MaxMemory = None,
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint in OUT/release."""
    from megatron_qwen.conversion.run import prepare_import

    conversion = prepare_import(
        hf_dir,
        out,
        ckpt_format=ckpt_format,
        layout=_layout(tp=tp, pp=pp, pp_layout=pp_layout, vpp=vpp, ep=ep, etp=etp),
        transformer_impl=transformer_impl,
        dtype=dtype,
        verify=verify,
        resume=resume,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        allow_pickle=allow_pickle,
        threads=threads,
        max_memory=_memory(max_memory),
        progress=not as_json,
    )
    run_conversion(conversion, is_dry=dry_run, as_json=as_json)


def export_command(
    megatron_dir: Annotated[Path, typer.Argument(help="Megatron folder: an import, a run, or one step.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make.")],
    step: _Step = None,
    config: _Config = None,
    max_shard_size: _ShardSize = "50GB",
    dtype: _Dtype = None,
    dry_run: _DryRun = False,
    verify: _Verify = False,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    allow_nonfinite: _Nonfinite = False,
    allow_pickle: _Pickle = False,
    max_memory: _MaxMemory = None,
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Convert the weights of a Megatron checkpoint to a Hugging Face folder."""
    from megatron_qwen.conversion.run import prepare_export

    conversion = prepare_export(
        megatron_dir,
        out,
        step=step,
        config=_read_config(config),
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
        dtype=dtype,
        verify=verify,
        resume=resume,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        allow_pickle=allow_pickle,
        threads=threads,
        max_memory=_memory(max_memory),
        progress=not as_json,
    )
    run_conversion(conversion, is_dry=dry_run, as_json=as_json)


def reshard_command(
    in_dir: Annotated[Path, typer.Argument(help="Megatron folder: an import, a run, or one step.")],
    out: Annotated[Path, typer.Argument(help="Megatron folder to make.")],
    ckpt_format: _Format = "torch_dist",
    tp: _Tp = None,
    pp: _Pp = None,
    pp_layout: _PpLayout = None,
    vpp: _Vpp = None,
    ep: _Ep = None,
    etp: _Etp = None,
    transformer_impl: _Impl = "local",
    step: _Step = None,
    config: _Config = None,
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
    dtype: _Dtype = None,
    dry_run: _DryRun = False,
    verify: _Verify = False,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    allow_nonfinite: _Nonfinite = False,
    allow_pickle: _Pickle = False,
    max_memory: _MaxMemory = None,
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Convert a Megatron checkpoint to another format or layout, so that a run can go on there."""
    from megatron_qwen.conversion.run import prepare_reshard

    conversion = prepare_reshard(
        in_dir,
        out,
        step=step,
        config=_read_config(config),
        ckpt_format=ckpt_format,
        layout=_layout(tp=tp, pp=pp, pp_layout=pp_layout, vpp=vpp, ep=ep, etp=etp),
        transformer_impl=transformer_impl,
        optimizer=optimizer,
        distributed_optimizer=distributed_optimizer,
        dtype=dtype,
        verify=verify,
        resume=resume,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        allow_pickle=allow_pickle,
        threads=threads,
        max_memory=_memory(max_memory),
        progress=not as_json,
    )
    run_conversion(conversion, is_dry=dry_run, as_json=as_json)


def parse_size(text: str, option: str) -> int:
    """Read "5GB", "500MB" or a number of bytes; units are decimal, as in `save_pretrained`.

    Raises:
        ConfigError: something else, or zero.
    """
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text.strip().upper())
    if match is None or int(match.group(1)) == 0:
        raise ConfigError(f"{option}: got {text!r}, expected a size such as 5GB or 500MB")
    return int(match.group(1)) * _UNITS[match.group(2)]


def _memory(text: str | None) -> int | None:
    return None if text is None else parse_size(text, "--max-memory")


def _layout(*, pp_layout: str | None, **sizes: int | None) -> ParallelLayout | None:
    from megatron_qwen.parallel.layout import ParallelLayout

    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if pp_layout is not None:
        given["pp_layout"] = ParallelLayout.parse_pp_layout(pp_layout)
    return ParallelLayout(**given) if given else None


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
