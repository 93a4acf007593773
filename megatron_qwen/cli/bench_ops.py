"""`megatron-qwen bench ops`: how fast our kernels are, against peers and against what the machine can do."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_qwen.cli.files import make_folder
from megatron_qwen.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from rich.console import Console

    from megatron_qwen.benchmark.ops.result import OpReport
    from megatron_qwen.benchmark.ops.run import OpsBench

TABLE_WIDTH = 190  # a file or pipe has no width of its own, and cut figures are of no use
REGRESSION_EXIT_CODE = 1
_SEVERAL = "Several with commas."


def ops(
    family: Annotated[
        str, typer.Option(help=f"rope, norm, swiglu, loss, moe, experts, attention. {_SEVERAL} (default: all)")
    ] = "",
    op: Annotated[str, typer.Option(help=f"As in --list. {_SEVERAL} (default: all)")] = "",
    model: Annotated[
        str, typer.Option(help=f"0.5b, 7b, 72b, a2.7b, 57b, any preset. {_SEVERAL} (default: by op)")
    ] = "",
    seq_length: Annotated[str, typer.Option(help=f"Tokens. {_SEVERAL} (default: by op and device)")] = "",
    dtype: Annotated[str, typer.Option(help=f"bf16, fp16, fp32. {_SEVERAL} (default: bf16 on CUDA, else fp32)")] = "",
    backend: Annotated[
        str, typer.Option(help=f"cuda, triton, reference. {_SEVERAL} (default: the kernels on CUDA, else reference)")
    ] = "",
    vs: Annotated[
        str,
        typer.Option(
            help="torch, compile, aten, grouped_mm, liger, te; of attention cudnn, flash, fa3, three_call, "
            f"three_call_fa3, per_head; or none. {_SEVERAL} (default: all)"
        ),
    ] = "",
    check: Annotated[bool, typer.Option("--check", help="Ours at odd sizes in every dtype, too.")] = False,
    sanitize: Annotated[bool, typer.Option("--sanitize", help="compute-sanitizer over the odd sizes, too.")] = False,
    sanitize_limit: Annotated[float, typer.Option(help="Seconds for each tool of --sanitize.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Folder for ops.json, ops.csv, summary.md and two charts.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    compare: Annotated[Path | None, typer.Option(help="The ops.json of an earlier run to compare with.")] = None,
    threshold: Annotated[str, typer.Option(help="How much slower ours may be than in --compare.")] = "5%",
    results: Annotated[Path | None, typer.Option(help="Take this ops.json for the run: nothing is measured.")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Measured rounds; 0 for --check and --sanitize alone. (default: 50 on CUDA, 10 on a CPU)"),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no other shape is begun; 0 for none.")] = 0.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. (default: cuda where there is one)")] = None,
    interpreter: Annotated[
        bool, typer.Option("--interpreter", help="Triton kernels on a CPU, line by line: checks only.")
    ] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the operations and stop.")] = False,
) -> None:
    """Check every contestant against fp64, then time ours and its peers in turn, beside copy and GEMM ceilings.

    Exits with 5 if a result of ours is wrong, and with 1 if ours became slower than --compare allows.
    """
    from megatron_qwen.benchmark.ops.comparing import parse_threshold
    from megatron_qwen.benchmark.ops.result import read_report

    allowed = parse_threshold(threshold)
    if show_list:
        _list_cases(json_output)
        return
    # Before anything is measured: a reference that cannot be read should not cost a run.
    reference = read_report(compare) if compare is not None else None
    if results is not None:
        report = read_report(results)
    else:
        bench = _bench(family, op, model, seq_length, dtype, backend, vs, rounds, _device(device, interpreter))
        check = check or interpreter
        if rounds == 0 and not (check or sanitize):
            raise ConfigError("--rounds 0 measures nothing; add --check or --sanitize")
        bench = replace(bench, check=check, sanitize=sanitize, sanitize_limit=sanitize_limit, time_limit=time_limit)
        if backend:
            bench.require_ours()
        report = _run(bench, out)
    _show(report, json_output)
    status = NumericsError.exit_code if report.problems() else 0
    if reference is not None and not _compare(report, reference, allowed, json_output):
        status = status or REGRESSION_EXIT_CODE
    if status:
        raise typer.Exit(status)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: expected whole numbers, with commas between them") from error


def _device(name: str | None, interpreter: bool) -> torch.device:
    import importlib.util

    from megatron_qwen.benchmark.ops.run import device_of

    if not interpreter:
        return device_of(name)
    if name == "cuda":
        raise ConfigError("--interpreter runs on the CPU; leave out --device cuda")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("--interpreter: Triton is not installed (pip install triton)")
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decides this when it is imported
    from megatron_qwen.testing.interpreter import round_as_a_device_does

    round_as_a_device_does()
    return device_of("cpu")


def _bench(
    family: str, op: str, model: str, seq_length: str, dtype: str, backend: str, vs: str, rounds: int | None,
    device: torch.device,
) -> OpsBench:  # fmt: skip
    from megatron_qwen.benchmark.ops.contestants import PEERS, default_backends
    from megatron_qwen.benchmark.ops.registry import choose_cases
    from megatron_qwen.benchmark.ops.run import ROUNDS, OpsBench

    # Under the interpreter there is no speed to compare, and a model's rows would take minutes.
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        rounds = 0
    elif rounds is None:
        rounds = ROUNDS[device.type]
    cases = choose_cases(_words(family), _words(op))
    known = {"torch", "compile"}.union(*(case.peers for case in cases))
    peers = () if interpreted else tuple(name for name in PEERS if name in known)
    return OpsBench(
        cases=cases,
        device=device,
        models=_words(model) or (None if rounds else ()),
        seq_lengths=_numbers("--seq-length", seq_length),
        dtypes=_words(dtype) or (("bf16",) if device.type == "cuda" else ("fp32",)),
        backends=_words(backend) or default_backends(device, interpreted=interpreted),
        versus=() if vs.strip() == "none" else _words(vs) or peers,
        rounds=rounds,
    )


def _run(bench: OpsBench, out: Path | None) -> OpReport:
    from megatron_qwen.benchmark.ops.run import write_report

    make_folder(out)
    command = "megatron-qwen " + shlex.join(sys.argv[1:])
    with _progress(bench.num_steps()) as advance:
        # Written as it goes: a run that is cut off leaves what it had.
        keep = (lambda report: _keep(report, out)) if out is not None else lambda report: None
        report = bench.run(advance, keep)
    if out is not None:
        files = write_report(report, out, command)
        _say("wrote " + ", ".join(str(file) for file in files))
    return report


def _keep(report: OpReport, out: Path) -> None:
    (out / "ops.json").write_text(report.as_json() + "\n", encoding="utf-8")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("bench ops", total=total)
        yield lambda what: progress.update(task, advance=1, description=what)


def _show(report: OpReport, as_json: bool) -> None:
    from megatron_qwen.benchmark.ops.show import losses, notes, tables

    if as_json:
        sys.stdout.write(report.as_json() + "\n")
        return
    console = _console()
    for each in tables(report):
        console.print(each)
    for text in notes(report):
        console.print(f"- {text}", highlight=False, markup=False)
    for text in losses(report):
        console.print(f"LOSS {text}", highlight=False, markup=False)
    for text in report.problems():
        console.print(f"WRONG {text}", highlight=False, markup=False)


def _compare(report: OpReport, reference: OpReport, threshold: float, as_json: bool) -> bool:
    """Show the changes (on stderr if stdout holds JSON) and return whether nothing of ours became slower."""
    from megatron_qwen.benchmark.ops.comparing import compare_reports
    from megatron_qwen.benchmark.ops.show import change_table

    changes = compare_reports(reference, report, threshold)
    console = _console(stderr=as_json)
    console.print(change_table(changes, threshold))
    for name, rows in (("the reference", changes.only_before), ("this run", changes.only_after)):
        if rows:
            console.print(f"- {len(rows)} rows are in {name} only", highlight=False)
    if changes.regressions:
        console.print(f"{len(changes.regressions)} of {len(changes.changes)} rows regressed", highlight=False)
    return not changes.regressions


def _list_cases(as_json: bool) -> None:
    import json

    from rich.box import SIMPLE
    from rich.table import Table

    from megatron_qwen import ops as operations
    from megatron_qwen.benchmark.ops.registry import all_cases

    rows = [
        {
            "op": case.name,
            "family": case.family,
            "about": case.about,
            "directions": list(case.directions),
            "backends": ["reference", *operations.OPERATIONS[case.operation]],
            "peers": [*(["torch"] * case.is_plain_timed), *(["compile"] * case.is_compiled), *case.peers],
        }
        for case in all_cases()
    ]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table(box=SIMPLE, padding=(0, 1))
    for heading in rows[0]:
        table.add_column(heading, no_wrap=heading != "about")
    for row in rows:
        table.add_row(*(", ".join(value) if isinstance(value, list) else str(value) for value in row.values()))
    _console().print(table)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    console.width = max(console.width, TABLE_WIDTH)
    return console


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, markup=False)
