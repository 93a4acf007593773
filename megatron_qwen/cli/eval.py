"""`megatron-qwen eval`: what a model does with long text: finding a number in it, and its loss by place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli.engine_options import EngineOptions, describe_chunks, with_engine_options
from megatron_qwen.cli.eval_report import passkey_record, show_passkey, show_perplexity, write_record
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError

if TYPE_CHECKING:
    from megatron_qwen.evaluation.passkey import PasskeyAnswer
    from megatron_qwen.inference.long_context import LongContext

Model = Annotated[Path, typer.Argument(help="Hugging Face folder, or Megatron checkpoint folder of this project.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the `eval` verbs."""
    group = typer.Typer(help="Measure what a model does with long text.", no_args_is_help=True)
    group.command("passkey")(with_engine_options(passkey))
    group.command("perplexity")(with_engine_options(perplexity))
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
    *,
    engine: EngineOptions,
    json_output: Json = False,
) -> None:
    """Hide a number in filler text of chosen lengths, at chosen depths, and ask for it."""
    _check(model)
    sizes, places = _numbers("--lengths", lengths, int), _numbers("--depths", depths, float)
    if trials < 1:
        raise ConfigError(f"--trials: got {trials}, expected at least 1")
    _relaunch(engine.tp * engine.pp)
    from megatron_qwen.data.control_tokens import END_OF_TURN
    from megatron_qwen.evaluation.passkey import ANSWER_TOKENS, make_case, run_passkey
    from megatron_qwen.parallel import groups

    tokenizer, context = _before_loading(model, engine)
    in_chat = tokenizer.encode(END_OF_TURN) == [tokenizer.eos_id] if chat is None else chat
    cases = [
        make_case(tokenizer, length=length, depth=depth, trial=trial, seed=seed, chat=in_chat)
        for length in sizes
        for depth in places
        for trial in range(trials)
    ]
    for case in cases:  # before the weights are read, which may take minutes
        context.require(case.prompt_tokens + ANSWER_TOKENS, f"--lengths {case.length}: prompt and answer")
    loaded = engine.load(model)
    settings = {"chat": in_chat, "seed": seed, "trials": trials, **_settings(model, loaded.context, engine)}
    so_far: list[PasskeyAnswer] = []
    with _progress("passkey", len(cases), quiet=json_output) as advance:

        def take(answer: PasskeyAnswer) -> None:
            so_far.append(answer)
            if groups.is_rank_zero():
                write_record("passkey", passkey_record(so_far, settings), out)  # hours of questions may be cut short
            advance()

        run_passkey(loaded, cases, on_answer=take)
    _finish(lambda: show_passkey(so_far, settings, out, as_json=json_output))


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
    *,
    engine: EngineOptions,
    json_output: Json = False,
) -> None:
    """Measure the loss of a text by window and by length."""
    _check(model)
    sizes = sorted(set(_numbers("--lengths", lengths, int)))
    if window < 2:
        raise ConfigError(f"--window: got {window}, expected at least 2")
    _relaunch(engine.tp * engine.pp)
    from megatron_qwen.evaluation.perplexity import cut, loss_by_length, loss_by_window, token_losses
    from megatron_qwen.inference.long_context import LongContext

    tokenizer, context = _before_loading(model, engine)
    pieces = cut(tokenizer.encode("".join(_read(file) for file in text)), length=sizes[-1], samples=samples)
    context.require(sizes[-1] - 1, f"--lengths {sizes[-1]}: the text")
    plain = LongContext.plain(_config(model))
    if against_full:
        plain.require(sizes[-1] - 1, "--against-full: the text")
    if against_full and context.chunks is None:
        raise ConfigError("--against-full: attention is plain without it; give --dca-chunk-size, or leave it out")
    loaded = engine.load(model)
    name = "plain attention" if context.chunks is None else "dual chunk attention"
    engines = {name: loaded} | ({"plain attention": loaded.attending(plain)} if against_full else {})
    losses = {}
    with _progress("perplexity", len(pieces) * len(engines), quiet=json_output) as advance:
        for name, each in engines.items():
            losses[name] = token_losses(each, pieces, on_piece=advance)
    windows = {name: loss_by_window(each, window=window) for name, each in losses.items()}
    totals = {name: loss_by_length(each, sizes) for name, each in losses.items()}
    settings = {"text": [str(file) for file in text], **_settings(model, context, engine)}
    _finish(lambda: show_perplexity(windows, totals, settings, out, as_json=json_output))


def _check(model: Path) -> None:
    """Refuse what can be refused before anything heavy is imported or any rank started."""
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


def _before_loading(model: Path, engine: EngineOptions) -> tuple[Any, LongContext]:
    from megatron_qwen.data.tokenizer import QwenTokenizer
    from megatron_qwen.inference.long_context import LongContext

    tokenizer = QwenTokenizer.load(model if (model / "config.json").is_file() else model / "hf")
    sizes = {"chunk_size": engine.dca_chunk_size, "local_size": engine.dca_local_size}
    return tokenizer, LongContext.of_model(_config(model), **sizes)


def _settings(model: Path, context: LongContext, engine: EngineOptions) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": engine.dtype or _config(model).torch_dtype,
        "layout": {"tp": engine.tp, "pp": engine.pp},
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
