"""`megatron-qwen bench`: how fast we are, measured in turn with what a user would otherwise run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli import bench_ops
from megatron_qwen.cli.files import make_folder
from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_qwen.benchmark.report import Report

DTYPES = ("fp32", "bf16")
PROFILED_STEPS = 3
TABLE_WIDTH = 126  # a file or pipe has none of its own, and cut figures are of no use


def register(app: typer.Typer) -> None:
    """Add the verb `bench` with one command per case."""
    bench = typer.Typer(
        help="Benchmarks; contestants are stepped in turn, each in a process of its own.", no_args_is_help=True
    )
    bench.command("train")(train)
    bench.command("data")(data)
    bench.command("convert")(convert)
    bench.command("ops")(bench_ops.ops)
    bench.command("moe")(moe)
    app.add_typer(bench, name="bench")


def train(
    model: Annotated[
        str, typer.Option(help="tiny, tiny-moe, small, small-moe, a preset (7B will do), or a Hugging Face folder.")
    ] = "small",
    layers: Annotated[int | None, typer.Option(help="Keep this many layers. (default: all)")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Another vocabulary. (default: the model's)")] = None,
    seq_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 512,
    micro_batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    threads: Annotated[int | None, typer.Option(help="Threads of each contestant. (default: all cores)")] = None,
    vs: Annotated[
        list[str] | None,
        typer.Option(help="transformers, transformers-bf16, megatron_qwen-logits, -fused; may be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps of each contestant.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps of each contestant before measuring.")] = 2,
    breakdown: Annotated[
        bool,
        typer.Option(help="Where our time goes, by kind of operation: from steps profiled after the measured ones."),
    ] = True,
    memory_check: Annotated[bool, typer.Option(help="Refuse what does not fit in memory before it is built.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for train.json, train.csv (appended), train.png; -breakdown.csv, .png.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time whole training steps: forward, backward, gradient clipping, AdamW; and say where the time goes."""
    from megatron_qwen.benchmark.cases.model_folder import find_config, write_model
    from megatron_qwen.benchmark.memory import free_memory, require_memory
    from megatron_qwen.benchmark.registry import choose, find_case
    from megatron_qwen.model.flops import train_flops_by_product

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: got {dtype!r}, expected one of {DTYPES}")
    make_folder(out)
    for name, value in (
        ("--seq-length", seq_length),
        ("--micro-batch-size", micro_batch_size),
        ("--threads", 1 if threads is None else threads),
    ):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, expected at least 1")
    config = find_config(model, layers=layers, seq_length=seq_length, vocab_size=vocab_size)
    contestants = [each.name for each in choose(find_case("train"), tuple(vs or ())) if not each.is_ceiling]
    tokens = seq_length * micro_batch_size
    if memory_check:
        available, device = free_memory()
        require_memory(config, dtype=dtype, tokens=tokens, contestants=contestants, available=available, device=device)
    setting = {
        "model": model,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "seq": seq_length,
        "batch": micro_batch_size,
        "dtype": dtype,
        "threads": threads or "all",
        "flops": "6 per weight and token, causal",
    }
    products = train_flops_by_product(config, seq_length, causal=True)
    flops = {kind: per_token * tokens for kind, per_token in products.items()}
    with TemporaryDirectory(prefix="qwen-bench-") as scratch:
        arguments = {
            "folder": str(write_model(Path(scratch) / "model", config, with_weights=bool(vs))),
            "dtype": dtype,
            "seq_length": seq_length,
            "micro_batch_size": micro_batch_size,
            "flops": sum(flops.values()),
        }
        if not vs:
            arguments["with_weights"] = False
        profile = {"steps": PROFILED_STEPS, "flops": flops} if breakdown else None
        report = _measure("train", arguments, setting, vs or [], threads, warmup, steps, profile)
    _show(report, out, json_output)


def moe(
    experts: Annotated[int, typer.Option(help="Routed experts.")] = 60,
    topk: Annotated[int, typer.Option(help="Experts of each token.")] = 4,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 512,
    ffn: Annotated[int, typer.Option(help="Width of a routed expert.")] = 352,
    shared_ffn: Annotated[int | None, typer.Option(help="Width of the shared expert. (default: topk x ffn)")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    threads: Annotated[int | None, typer.Option(help="Threads of each contestant. (default: all cores)")] = None,
    vs: Annotated[
        list[str] | None,
        typer.Option(help="megatron-core, transformers, transformers-loop; may be repeated. (default: all)"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps of each contestant.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps of each contestant before measuring.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder for moe.json, moe.csv (appended) and moe.png.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time one MoE layer, forward and backward, against Megatron-Core's sequential experts and transformers'."""
    from megatron_qwen.benchmark.registry import find_case

    shared = topk * ffn if shared_ffn is None else shared_ffn
    sizes = {"experts": experts, "topk": topk, "hidden": hidden, "ffn": ffn, "shared_ffn": shared, "tokens": tokens}
    for name, value in {**sizes, "threads": 1 if threads is None else threads}.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    if topk > experts:
        raise ConfigError(f"--topk: got {topk}, expected at most --experts ({experts})")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: got {dtype!r}, expected one of {DTYPES}")
    make_folder(out)
    versus = [each.name for each in find_case("moe").contestants[1:]] if vs is None else vs
    setting = {**sizes, "dtype": dtype, "threads": threads or "all", "flops": "6 per weight and token"}
    _show(
        _measure("moe", {"sizes": sizes, "dtype": dtype}, setting, versus, threads, warmup, steps, None),
        out,
        json_output,
    )


def data(
    sources: Annotated[list[Path], typer.Argument(help="Text, JSONL, Parquet or source-code files or folders.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder or file of the tokenizer.")],
    workers: Annotated[int, typer.Option(help="Processes of each contestant.")] = 2,
    steps: Annotated[int, typer.Option(help="Times that each contestant encodes everything.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for data.json, data.csv (appended) and data.png.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time `data prepare` against bare `tokenizers.encode_batch` on the same text and processes."""
    from megatron_qwen.benchmark.cases.data_prepare import measure_data

    make_folder(out)
    _show(measure_data(sources, tokenizer, workers=workers, repeats=steps), out, json_output)


def convert(
    hf_dir: Annotated[Path | None, typer.Argument(help="Hugging Face folder to convert.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Generate a folder of this shape: tiny, small, ... or a preset.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the generated model. (default: all)")] = None,
    rounds: Annotated[int, typer.Option(help="Conversions by each contestant.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Writer threads of ours. (default: as convert's)")] = None,
    legacy: Annotated[bool, typer.Option("--legacy", help="Per-rank files at TP 2 x PP 2, too.")] = False,
    large: Annotated[
        bool, typer.Option("--large", help="A generated checkpoint of the 3B shape, too: 19 GB of disk.")
    ] = False,
    dry_run_model: Annotated[
        str, typer.Option(help="Shape of the sparse checkpoint that is planned with --dry-run.")
    ] = "qwen2.5-14b",
    only: Annotated[
        list[str] | None, typer.Option(help="A line of the table; may be given again. (default: all)")
    ] = None,
    scratch: Annotated[Path | None, typer.Option(help="Where to convert. (default: for temporary files)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for convert.json, convert.csv (appended) and convert.png.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time convert import and export against copying with SHA-256 (the ceiling) and transformers load + save."""
    from rich.console import Console
    from rich.progress import Progress

    from megatron_qwen.benchmark.cases.convert import ConvertBench
    from megatron_qwen.benchmark.cases.convert_report import tables, write_conversion_report

    bench = ConvertBench(
        source=hf_dir,
        model=model,
        layers=layers,
        rounds=rounds,
        threads=threads,
        legacy=legacy,
        large=large,
        dry_run_model=dry_run_model,
        only=tuple(only or ()),
        scratch=scratch,
    )
    make_folder(out)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("bench convert", total=bench.num_steps())
        report = bench.run(lambda what: progress.update(task, advance=1, description=what))
    if json_output:
        sys.stdout.write(report.as_json() + "\n")
    else:
        console = _console()
        for each in tables(report):
            console.print(each)
    for note in report.notes:
        Console(stderr=True).print(note, highlight=False)
    if out is not None:
        _say_written(write_conversion_report(report, out))


def _measure(
    name: str,
    arguments: Mapping[str, Any],
    setting: Mapping[str, Any],
    versus: Sequence[str],
    threads: int | None,
    warmup: int,
    rounds: int,
    profile: Mapping[str, Any] | None,
) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    from megatron_qwen.benchmark.registry import find_case
    from megatron_qwen.benchmark.run import run_case

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"bench {name}", total=warmup + rounds)
        return run_case(
            find_case(name),
            arguments,
            setting,
            versus=versus,
            threads=threads,
            warmup=warmup,
            rounds=rounds,
            on_round=lambda done: progress.update(task, completed=done),
            profile=profile,
        )


def _show(report: Report, out: Path | None, as_json: bool) -> None:
    from megatron_qwen.benchmark.breakdown_report import breakdown_table
    from megatron_qwen.benchmark.report import table, write_report

    if as_json:
        sys.stdout.write(report.as_json() + "\n")
    else:
        console = _console()
        console.print(table(report))
        if report.breakdown is not None:
            console.print(breakdown_table(report.breakdown))
    if out is not None:
        _say_written(write_report(report, out))


def _console() -> Console:
    from rich.console import Console

    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


def _say_written(files: Sequence[Path]) -> None:
    from rich.console import Console

    Console(stderr=True).print("wrote " + ", ".join(str(file) for file in files), highlight=False)
