"""`megatron-qwen train pretrain`: a recipe from options, run on this rank, on local ranks, or under torchrun."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from megatron_qwen.errors import INTERRUPTED_EXIT_CODE, ConfigError

if TYPE_CHECKING:
    from megatron_qwen.training.recipe import Recipe
    from megatron_qwen.training.summary import TrainSummary

# Command-line option (a parameter of `pretrain`) -> recipe field.
_FIELDS = {
    "model": "model.source",
    "tokenizer": "data.tokenizer",
    "split": "data.split",
    "out": "out",
    "seed": "seed",
    "seq_length": "model.seq_length",
    "dtype": "model.dtype",
    "dca_chunk_size": "model.dca_chunk_size",
    "dca_local_size": "model.dca_local_size",
    "tp": "parallel.tp",
    "pp": "parallel.pp",
    "vpp": "parallel.vpp",
    "ep": "parallel.ep",
    "etp": "parallel.etp",
    "cp": "parallel.cp",
    "cp_comm_type": "performance.cp_comm_type",
    "dp": "parallel.dp",
    "sequence_parallel": "parallel.sequence_parallel",
    "pp_layout": "parallel.pp_layout",
    "steps": "schedule.steps",
    "micro_batch_size": "schedule.micro_batch_size",
    "global_batch_size": "schedule.global_batch_size",
    "warmup_steps": "schedule.warmup_steps",
    "lr_style": "schedule.style",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "recompute": "performance.recompute",
    "save_every": "checkpoint.save_every",
    "keep_last": "checkpoint.keep_last",
    "log_every": "logging.log_every",
    "eval_every": "logging.eval_every",
}

_LAYOUT = "Parallel layout"
_RUN = "Length, batch, learning rate"
_KEEP = "Checkpoints and reports"


def register(app: typer.Typer) -> None:
    """Add the verb `train` with its task `pretrain`."""
    tasks = typer.Typer(no_args_is_help=True, help="Train a model: pretrain.")
    # A callback keeps the task's name on the command line while there is one task only.
    tasks.callback()(lambda: None)
    tasks.command("pretrain")(pretrain)
    app.add_typer(tasks, name="train")


def pretrain(
    context: typer.Context,
    data: Annotated[
        list[str] | None, typer.Option(help="Prefix of a .bin/.idx pair, or WEIGHT:PREFIX; may be given again.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="tiny, tiny-moe, a preset, or a Hugging Face or Megatron folder. (default: tiny)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder: checkpoints, metrics, loss curve. (default: run)")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or file. (default: the model folder's)")] = None,
    split: Annotated[str | None, typer.Option(help="Shares of train, validation and test documents.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, dropout and data order.")] = None,
    seq_length: Annotated[int | None, typer.Option(help="Tokens per sample.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 (with fp32 master weights) or fp32.")] = None,
    dca_chunk_size: Annotated[
        int | None, typer.Option(help="Dual Chunk Attention; 0 for plain. (default: the model's)")
    ] = None,
    dca_local_size: Annotated[
        int | None, typer.Option(help="Of it, at true distance to the chunk before. (default: a sixteenth)")
    ] = None,
    nproc: Annotated[int, typer.Option(help="Local ranks to start; under torchrun leave it out.")] = 1,
    tp: Annotated[
        int | None, typer.Option("--tp", "--tensor-model-parallel-size", help="Tensor.", rich_help_panel=_LAYOUT)
    ] = None,
    pp: Annotated[
        int | None, typer.Option("--pp", "--pipeline-model-parallel-size", help="Pipeline.", rich_help_panel=_LAYOUT)
    ] = None,
    vpp: Annotated[
        int | None,
        typer.Option(
            "--vpp",
            "--virtual-pipeline-model-parallel-size",
            help="Virtual stages per pipeline rank.",
            rich_help_panel=_LAYOUT,
        ),
    ] = None,
    ep: Annotated[
        int | None, typer.Option("--ep", "--expert-model-parallel-size", help="Expert.", rich_help_panel=_LAYOUT)
    ] = None,
    etp: Annotated[
        int | None,
        typer.Option(
            "--etp", "--expert-tensor-parallel-size", help="Tensor, within an expert.", rich_help_panel=_LAYOUT
        ),
    ] = None,
    cp: Annotated[
        int | None, typer.Option("--cp", "--context-parallel-size", help="Context.", rich_help_panel=_LAYOUT)
    ] = None,
    cp_comm_type: Annotated[
        str | None, typer.Option(help="Keys of other ranks: p2p (a ring) or all_gather.", rich_help_panel=_LAYOUT)
    ] = None,
    dp: Annotated[
        int | None, typer.Option("--dp", "--data-parallel-size", help="Data. (default: fits)", rich_help_panel=_LAYOUT)
    ] = None,
    sequence_parallel: Annotated[
        bool | None, typer.Option("--sequence-parallel/--no-sequence-parallel", rich_help_panel=_LAYOUT)
    ] = None,
    pp_layout: Annotated[
        str | None,
        typer.Option(
            "--pp-layout",
            "--pipeline-model-parallel-layout",
            help="Layers per stage for uneven pipelines, such as 3,5.",
            rich_help_panel=_LAYOUT,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--train-iters", rich_help_panel=_RUN)] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Samples per forward pass.", rich_help_panel=_RUN)
    ] = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Samples per step.", rich_help_panel=_RUN)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_RUN)] = None,
    min_lr: Annotated[float | None, typer.Option(help="(default: lr / 10)", rich_help_panel=_RUN)] = None,
    lr_style: Annotated[
        str | None,
        typer.Option("--lr-style", "--lr-decay-style", help="constant, linear, cosine or wsd.", rich_help_panel=_RUN),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option("--warmup-steps", "--lr-warmup-iters", help="(default: 5%)", rich_help_panel=_RUN)
    ] = None,
    recompute: Annotated[
        str | None, typer.Option(help="Activations: none, selective or full.", rich_help_panel=_RUN)
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", "--save-interval", help="(default: at the end)", rich_help_panel=_KEEP),
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option(help="Checkpoints to keep. (default: all)", rich_help_panel=_KEEP)
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", "--eval-interval", help="(default: never)", rich_help_panel=_KEEP),
    ] = None,
    log_every: Annotated[int | None, typer.Option("--log-every", "--log-interval", rich_help_panel=_KEEP)] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest valid checkpoint of --out.", rich_help_panel=_KEEP)
    ] = True,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(help="Part that may differ from the checkpoint's: seed, data, ...", rich_help_panel=_KEEP),
    ] = None,
    stop_at: Annotated[
        int | None, typer.Option(help="Save and stop after this step, to go on later.", rich_help_panel=_KEEP)
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Start from pickled weights, under an allow-list of plain classes."),
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="YAML or JSON file with recipe fields.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any recipe field: group.field=value; may be given again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the full recipe; start nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, progress on stderr.")] = False,
) -> None:
    """Pre-train on .bin/.idx data: from scratch, or on from a model folder's weights.

    Options win over --recipe, --set wins over both. The full recipe is saved with the run.
    """
    options = {name: value for name, value in context.params.items() if name in _FIELDS and value is not None}
    full = build_recipe(options, data or [], recipe, set_ or [])
    _run(
        full,
        nproc=nproc,
        is_dry_run=dry_run,
        is_json=json_output,
        train_options={
            "resume": resume,
            "allow_changed": [part for text in allow_changed or [] for part in text.split(",")],
            "stop_at": stop_at,
            "allow_pickle": allow_pickle,
        },
    )


def build_recipe(options: Mapping[str, Any], data: list[str], file: Path | None, assignments: list[str]) -> Recipe:
    """Return the recipe of a command line: the model's defaults, then file, options and --set, later ones win."""
    from megatron_qwen.recipes import pretrain as recipes
    from megatron_qwen.training.overrides import apply_overrides, load_recipe, recipe_from_dict

    values: dict[str, Any] = {}
    for name, value in options.items():
        *groups, field = _FIELDS[name].split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
        target[field] = str(value) if isinstance(value, Path) else value
    if "pp_layout" in options:
        from megatron_qwen.parallel.layout import ParallelLayout

        values["parallel"]["pp_layout"] = list(ParallelLayout.parse_pp_layout(options["pp_layout"]))
    if data:
        values.setdefault("data", {})["blend"] = [_parse_data(text) for text in data]
    source = options.get("model") or (load_recipe(file).model.source if file else "tiny")
    base = recipes.pretrain(source)
    if file is not None:
        base = load_recipe(file, base)
    return apply_overrides(recipe_from_dict(values, base), assignments)


def _parse_data(text: str) -> list[Any]:
    weight, colon, prefix = text.partition(":")
    if colon:
        try:
            return [float(weight), prefix]
        except ValueError:
            pass  # a colon within a path
    return [1.0, text]


def _run(recipe: Recipe, *, nproc: int, is_dry_run: bool, is_json: bool, train_options: dict[str, Any]) -> None:
    from megatron_qwen.parallel.launch import is_rank_process, relaunch_on_local_ranks

    if nproc < 1:
        raise ConfigError(f"--nproc: got {nproc}, expected at least 1")
    if is_dry_run or (nproc > 1 and not is_rank_process()):
        from megatron_qwen.training.rank import check_recipe, world_size_of_environment
        from megatron_qwen.training.source import resolve_source

        # Here, so that a recipe that cannot run says so once and not from every rank.
        check_recipe(recipe, resolve_source(recipe).config, max(nproc, world_size_of_environment()))
        if is_dry_run:
            _print_recipe(recipe, is_json)
            return
        raise typer.Exit(relaunch_on_local_ranks(sys.argv[1:], nproc))
    from megatron_qwen.compat import quiet_dependencies
    from megatron_qwen.training.loop import train

    quiet_dependencies()
    console = Console(stderr=is_json, highlight=False, markup=False, soft_wrap=True)
    summary = train(recipe, echo=console.print, **train_options)
    from megatron_qwen.parallel.groups import is_rank_zero

    if is_rank_zero():
        _report(summary, console, is_json)
    if summary.interrupted and train_options["stop_at"] != summary.steps:
        raise typer.Exit(INTERRUPTED_EXIT_CODE)


def _print_recipe(recipe: Recipe, is_json: bool) -> None:
    from megatron_qwen.training.overrides import dump_recipe, recipe_to_dict

    sys.stdout.write(json.dumps(recipe_to_dict(recipe), indent=2) + "\n" if is_json else dump_recipe(recipe))


def _report(summary: TrainSummary, console: Console, is_json: bool) -> None:
    if is_json:
        sys.stdout.write(json.dumps(summary.to_dict()) + "\n")
        return
    state = "interrupted at" if summary.interrupted else "finished"
    valid = "" if summary.valid_loss is None else f", validation {summary.valid_loss:.4f}"
    console.print(
        f"{state} step {summary.steps}: loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}{valid}; "
        f"{summary.tokens_per_second:,.0f} tokens/s, {summary.tflops:.3g} TFLOP/s per rank, MFU {summary.mfu:.1%} "
        f"of {summary.peak}; peak memory {summary.peak_memory_bytes / 2**30:.2f} GiB"
    )
    for name in ("checkpoint", "loss_curve", "metrics", "recipe"):
        console.print(f"{name.replace('_', ' ')}: {getattr(summary, name)}")
