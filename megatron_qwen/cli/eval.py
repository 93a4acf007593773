"""`megatron-qwen eval`: what a model does with long text: finding a number in it, and its loss by place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli.engine_options import (
    DcaChunkOption,
    DcaLocalOption,
    PrefillOption,
    check_dtype,
    describe_chunks,
    load_engine,
)
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError

if TYPE_CHECKING:
    from megatron_qwen.evaluation.passkey import PasskeyAnswer, PasskeyCase
    from megatron_qwen.evaluation.perplexity import WindowLoss
    from megatron_qwen.inference.long_context import LongContext

Model = Annotated[Path, typer.Argument(help="Hugging Face folder, or Megatron checkpoint folder of this project.")]
Tp = Annotated[int, typer.Option("--tp", "--tensor-model-parallel-size", help="Tensor parallel size.")]
Pp = Annotated[int, typer.Option("--pp", "--pipeline-model-parallel-size", help="Pipeline parallel size.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. [default: the folder's own]")]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open weights in pickle files, under an allow-list of plain classes.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the `eval` verbs."""
    group = typer.Typer(help="Measure what a model does with long text.", no_args_is_help=True)
    group.command("passkey")(passkey)
    group.command("perplexity")(perplexity)
    app.add_typer(group, name="eval")


def passkey(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = "4096,8192",
    depths: Annotated[str, typer.Option(help="Places of the key, from 0 (start) to 1 (end).")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Questions at each length and depth.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the keys.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--completion", help="Ask in a chat. [default: where the tokenizer ends turns]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for passkey.json and passkey.png.")] = None,
    dca_chunk_size: DcaChunkOption = None,
    dca_local_size: DcaLocalOption = None,
    prefill_chunk_size: PrefillOption = None,
    tp: Tp = 1,
    pp: Pp = 1,
    dtype: Dtype = None,
    allow_pickle: Pickle = False,
    json_output: Json = False,
) -> None:
    """Hide a number in filler text of chosen lengths, at chosen depths, and ask for it."""
    _check(model, dtype)
    sizes, places = _numbers("--lengths", lengths, int), _numbers("--depths", depths, float)
    if trials < 1:
        raise ConfigError(f"--trials: got {trials}, expected at least 1")
    _relaunch(tp * pp)
    from megatron_qwen.data.control_tokens import END_OF_TURN
    from megatron_qwen.evaluation.passkey import ANSWER_TOKENS, make_case, run_passkey
    from megatron_qwen.parallel import groups

    tokenizer, context = _before_loading(model, dca_chunk_size, dca_local_size)
    in_chat = tokenizer.encode(END_OF_TURN) == [tokenizer.eos_id] if chat is None else chat
    cases = [
        make_case(tokenizer, length=length, depth=depth, trial=trial, seed=seed, chat=in_chat)
        for length in sizes
        for depth in places
        for trial in range(trials)
    ]
    for case in cases:  # before the weights are read, which may take minutes
        context.require(case.prompt_tokens + ANSWER_TOKENS, f"--lengths {case.length}: prompt and answer")
    engine = load_engine(
        model, layout=(tp, pp), dtype=dtype, allow_pickle=allow_pickle, chunk_size=dca_chunk_size,
        local_size=dca_local_size, prefill_chunk_size=prefill_chunk_size,
    )  # fmt: skip
    settings = {"chat": in_chat, "seed": seed, "trials": trials, **_settings(model, engine.context, dtype, (tp, pp))}
    so_far: list[PasskeyAnswer] = []
    with _progress("passkey", len(cases), quiet=json_output) as advance:

        def take(answer: PasskeyAnswer) -> None:
            so_far.append(answer)
            if groups.is_rank_zero():
                _write("passkey", _passkey_record(so_far, settings), out)  # hours of questions may be cut short
            advance()

        run_passkey(engine, cases, on_answer=take)
    _finish(lambda: _show_passkey(so_far, settings, out, as_json=json_output))


def perplexity(
    model: Model,
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text; may be given again, files are joined.")],
    lengths: Annotated[str, typer.Option(help="Tokens of a text, separated by commas.")] = "4096",
    window: Annotated[int, typer.Option(help="Tokens over which losses are averaged.")] = 1024,
    samples: Annotated[int, typer.Option(help="Pieces of the text, of the greatest length each.")] = 1,
    against_full: Annotated[
        bool, typer.Option("--against-full", help="Measure plain attention too, and the difference.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for perplexity.json and perplexity.png.")] = None,
    dca_chunk_size: DcaChunkOption = None,
    dca_local_size: DcaLocalOption = None,
    prefill_chunk_size: PrefillOption = None,
    tp: Tp = 1,
    pp: Pp = 1,
    dtype: Dtype = None,
    allow_pickle: Pickle = False,
    json_output: Json = False,
) -> None:
    """Measure the loss of a text by window and by length."""
    _check(model, dtype)
    sizes = sorted(set(_numbers("--lengths", lengths, int)))
    if window < 2:
        raise ConfigError(f"--window: got {window}, expected at least 2")
    _relaunch(tp * pp)
    from megatron_qwen.evaluation.perplexity import cut, loss_by_length, loss_by_window, token_losses
    from megatron_qwen.inference.long_context import LongContext

    tokenizer, context = _before_loading(model, dca_chunk_size, dca_local_size)
    pieces = cut(tokenizer.encode("".join(_read(file) for file in text)), length=sizes[-1], samples=samples)
    context.require(sizes[-1] - 1, f"--lengths {sizes[-1]}: the text")
    plain = LongContext.plain(_config(model))
    if against_full:
        plain.require(sizes[-1] - 1, "--against-full: the text")
    if against_full and context.chunks is None:
        raise ConfigError("--against-full: attention is plain without it; give --dca-chunk-size, or leave it out")
    engine = load_engine(
        model, layout=(tp, pp), dtype=dtype, allow_pickle=allow_pickle, chunk_size=dca_chunk_size,
        local_size=dca_local_size, prefill_chunk_size=prefill_chunk_size,
    )  # fmt: skip
    name = "plain attention" if context.chunks is None else "dual chunk attention"
    engines = {name: engine} | ({"plain attention": engine.attending(plain)} if against_full else {})
    losses = {}
    with _progress("perplexity", len(pieces) * len(engines), quiet=json_output) as advance:
        for name, each in engines.items():
            losses[name] = token_losses(each, pieces, on_piece=advance)
    windows = {name: loss_by_window(each, window=window) for name, each in losses.items()}
    totals = {name: loss_by_length(each, sizes) for name, each in losses.items()}
    settings = {"text": [str(file) for file in text], **_settings(model, context, dtype, (tp, pp))}
    _finish(lambda: _show_perplexity(windows, totals, settings, out, as_json=json_output))


def _check(model: Path, dtype: str | None) -> None:
    """Refuse what can be refused before anything heavy is imported or any rank started."""
    check_dtype(dtype)
    if not model.is_dir():
        raise IncompleteInputError(f"{model}: no such folder; expected a Hugging Face or Megatron checkpoint folder")


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        numbers = [kind(each) for each in text.split(",")]
    except ValueError:
        example = "4096,8192" if kind is int else "0,0.5,1"
        raise ConfigError(f"{option}: got {text!r}, expected numbers separated by commas, such as {example}") from None
    if kind is int and min(numbers) < 2:
        raise ConfigError(f"{option}: got {text!r}, expected at least 2 tokens")
    return numbers


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IncompleteInputError(f"--text {file}: no such file") from None
    except UnicodeDecodeError as error:
        raise CorruptInputError(f"--text {file}: not UTF-8 text: {error}") from error


def _relaunch(ranks: int) -> None:
    from megatron_qwen.parallel.launch import is_rank_process, relaunch_on_local_ranks

    if ranks > 1 and not is_rank_process():
        raise typer.Exit(relaunch_on_local_ranks(sys.argv[1:], ranks))


def _config(model: Path) -> Any:
    from megatron_qwen.conversion.loading import read_config

    return read_config(model)


def _before_loading(model: Path, chunk_size: int | None, local_size: int | None) -> tuple[Any, LongContext]:
    from megatron_qwen.data.tokenizer import QwenTokenizer
    from megatron_qwen.inference.long_context import LongContext

    tokenizer = QwenTokenizer.load(model if (model / "config.json").is_file() else model / "hf")
    return tokenizer, LongContext.of_model(_config(model), chunk_size=chunk_size, local_size=local_size)


def _settings(model: Path, context: LongContext, dtype: str | None, layout: tuple[int, int]) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": dtype or _config(model).torch_dtype,
        "layout": {"tp": layout[0], "pp": layout[1]},
        "dual_chunk_attention": describe_chunks(context),
    }


@contextlib.contextmanager
def _progress(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from megatron_qwen.parallel import groups

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), disable=quiet or not groups.is_rank_zero(),
    )  # fmt: skip
    task = bar.add_task(what, total=total)
    with bar:
        yield lambda: bar.advance(task)


def _finish(show: Callable[[], None]) -> None:
    from megatron_qwen.parallel import groups

    if groups.is_rank_zero():
        show()
    groups.shutdown()


def _passkey_record(answers: Sequence[PasskeyAnswer], settings: dict[str, Any]) -> dict[str, Any]:
    from megatron_qwen.evaluation.passkey import accuracy_table

    table = accuracy_table(answers)
    return {
        **settings,
        "found": {str(length): {str(depth): share for depth, share in row.items()} for length, row in table.items()},
        "answers": [_without_prompt(each.case) | {
            "answer": each.answer, "is_correct": each.is_correct, "seconds": round(each.seconds, 3)
        } for each in answers],
    }  # fmt: skip


def _show_passkey(
    answers: Sequence[PasskeyAnswer], settings: dict[str, Any], out: Path | None, *, as_json: bool
) -> None:
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
    _print(_passkey_record(answers, settings), f"Keys found: {_describe(settings)}", shown, as_json=as_json)
    if out is not None:
        draw_heat_map(table, out / "passkey.png", title=_describe(settings))


def _without_prompt(case: PasskeyCase) -> dict[str, Any]:
    values = dataclasses.asdict(case)
    del values["prompt"]  # as long as it says, and the same for the same seed
    return values


def _show_perplexity(
    windows: dict[str, list[WindowLoss]],
    totals: dict[str, list[WindowLoss]],
    settings: dict[str, Any],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
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
    _write("perplexity", record, out)
    if out is not None:
        draw_losses(windows, out / "perplexity.png", title=_describe(settings))


def _describe(settings: dict[str, Any]) -> str:
    chunks = settings["dual_chunk_attention"]
    how = f"chunk {chunks['chunk_size']:,}, window {chunks['local_size']:,}" if chunks else "plain attention"
    return f"{Path(settings['model']).resolve().name}, {settings['dtype']}, {how}"


def _print(record: dict[str, Any], title: str, table: Any, *, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, markup=False)
    console.print(title)
    console.print(table)


def _write(name: str, record: dict[str, Any], out: Path | None) -> None:
    from megatron_qwen.checkpoint.atomic import atomic_write_text, storage_errors

    if out is None:
        return
    with storage_errors(f"cannot create {out}"):
        out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / f"{name}.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
