"""The options that the verbs of `convert` share: how they are typed, and what a conversion makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.parallel.layout import ParallelLayout

_LAYOUT, _RUNNING = "Layout of per-rank files (--ckpt-format torch)", "Running"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Format = Annotated[str, typer.Option("--ckpt-format", help="torch_dist: loads at any layout; torch: per-rank files.")]
Tp = Annotated[
    int | None,
    typer.Option("--tp", "--tensor-model-parallel-size", help="Tensor parallel size.", rich_help_panel=_LAYOUT),
]
Pp = Annotated[
    int | None,
    typer.Option("--pp", "--pipeline-model-parallel-size", help="Pipeline parallel size.", rich_help_panel=_LAYOUT),
]
PpLayout = Annotated[
    str | None, typer.Option("--pp-layout", help="Layers of each stage, such as 6,8,8,6.", rich_help_panel=_LAYOUT)
]
Vpp = Annotated[
    int | None,
    typer.Option(
        "--vpp",
        "--num-virtual-stages-per-pipeline-rank",
        help="Virtual stages per pipeline rank.",
        rich_help_panel=_LAYOUT,
    ),
]
Ep = Annotated[
    int | None,
    typer.Option("--ep", "--expert-model-parallel-size", help="Expert parallel size.", rich_help_panel=_LAYOUT),
]
Etp = Annotated[
    int | None,
    typer.Option(
        "--etp",
        "--expert-tensor-parallel-size",
        help="Tensor parallel size of experts; default: tp",
        rich_help_panel=_LAYOUT,
    ),
]
Impl = Annotated[
    str,
    typer.Option(
        "--transformer-impl",
        help="Names in per-rank files: local, or transformer_engine.",
        rich_help_panel=_LAYOUT,
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: that of each tensor in the input.")
]
ShardSize = Annotated[str, typer.Option(help="Largest file, such as 5GB or 500MB.")]
Step = Annotated[int | None, typer.Option(help="Step of a run; default: the latest.")]
Config = Annotated[
    Path | None, typer.Option(help="config.json or Hugging Face folder, for a checkpoint without hf/config.json.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Prove the plan from headers and print it; write nothing.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read the output again and compare it bit for bit before it gets its name.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted conversion left beside OUT.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Nonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Convert NaN and infinity instead of refusing.")]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open pickle files of the input, under an allow-list of plain classes.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for tensors at work, such as 500MB; default: some 4 MiB slices.", rich_help_panel=_RUNNING
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads that write; default: the processor cores, 2 to 8.", rich_help_panel=_RUNNING)
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON, without a progress bar.")]

# Parameters of the commands that are fields of ConversionOptions as they are.
_AS_THEY_ARE = (
    "ckpt_format",
    "transformer_impl",
    "optimizer",
    "distributed_optimizer",
    "dtype",
    "verify",
    "resume",
    "overwrite",
    "allow_nonfinite",
    "allow_pickle",
    "threads",
)
_SIZES = ("tp", "pp", "vpp", "ep", "etp")


def conversion_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ConversionOptions` for a command's parameters; those of other kinds are passed over.

    Raises:
        ConfigError: a size or a pipeline layout cannot be read.
    """
    options = {name: given[name] for name in _AS_THEY_ARE if name in given}
    if "tp" in given:
        options["layout"] = _layout({name: given[name] for name in _SIZES}, given["pp_layout"])
    if "max_shard_size" in given:
        options["max_shard_bytes"] = parse_size(given["max_shard_size"], "--max-shard-size")
    if given["max_memory"] is not None:
        options["max_memory"] = parse_size(given["max_memory"], "--max-memory")
    return {**options, "progress": not given["as_json"]}


def parse_size(text: str, option: str) -> int:
    """Read "5GB", "500MB" or a number of bytes; units are decimal, as in `save_pretrained`.

    Raises:
        ConfigError: something else, or zero.
    """
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text.strip().upper())
    if match is None or int(match.group(1)) == 0:
        raise ConfigError(f"{option}: got {text!r}, expected a size such as 5GB or 500MB")
    return int(match.group(1)) * _UNITS[match.group(2)]


def _layout(sizes: Mapping[str, int | None], pp_layout: str | None) -> ParallelLayout | None:
    from megatron_qwen.parallel.layout import ParallelLayout

    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if pp_layout is not None:
        given["pp_layout"] = ParallelLayout.parse_pp_layout(pp_layout)
    return ParallelLayout(**given) if given else None
