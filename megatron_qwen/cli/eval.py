"""`megatron-qwen eval`: what a model does with long text: keys found, loss by place, and what attention needs of it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli.engine_options import EngineOptions, describe_chunks, describe_sparse, with_engine_options
from megatron_qwen.cli.eval_report import (
    passkey_record,
    show_calibration,
    show_passkey,
    show_perplexity,
    write_record,
)
from megatron_qwen.cli.files import make_folder, read_text
from megatron_qwen.errors import ConfigError, IncompleteInputError

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
    group.command("sparse-calibration")(with_engine_options(sparse_calibration))
    app.add_typer(group, name="eval")


def passkey(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = "4096,8192",
    depths: Annotated[str, typer.Option(help="Places of the key, from 0 (start) to 1 (end).")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Questions at each length and depth.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the keys.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--completion", help="Ask in a chat. (default: where the tokenizer ends turns)"),
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

    make_folder(out)
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
    against_dense: Annotated[
        bool, typer.Option("--against-dense", help="Measure without sparse prefill too, and the difference.")
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

    make_folder(out)
    tokenizer, context = _before_loading(model, engine)
    pieces = cut(
        tokenizer.encode("".join(read_text("--text", file) for file in text)), length=sizes[-1], samples=samples
    )
    context.require(sizes[-1] - 1, f"--lengths {sizes[-1]}: the text")
    plain = LongContext.plain(_config(model))
    if against_full:
        plain.require(sizes[-1] - 1, "--against-full: the text")
    if against_full and context.chunks is None:
        raise ConfigError("--against-full: attention is plain without it; give --dca-chunk-size, or leave it out")
    if against_dense and not context.is_sparse(sizes[-1] - 1):
        raise ConfigError(
            f"--against-dense: prefill of {sizes[-1] - 1:,} tokens is dense without it; give --sparse-prefill on and a "
            "smaller --sparse-attention-threshold, or leave it out"
        )
    loaded = engine.load(model)
    dense = dataclasses.replace(context, sparse=None)
    others = [plain] * against_full + [dense] * against_dense
    engines = {_name(each): loaded.attending(each) for each in (context, *others)}
    losses = {}
    with _progress("perplexity", len(pieces) * len(engines), quiet=json_output) as advance:
        for name, each in engines.items():
            losses[name] = token_losses(each, pieces, on_piece=advance)
    windows = {name: loss_by_window(each, window=window) for name, each in losses.items()}
    totals = {name: loss_by_length(each, sizes) for name, each in losses.items()}
    settings = {"text": [str(file) for file in text], **_settings(model, context, engine)}
    _finish(lambda: show_perplexity(windows, totals, settings, out, as_json=json_output))


def sparse_calibration(
    model: Model,
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text; may be given again, files are joined.")],
    out: Annotated[Path, typer.Option(help="Folder for sparse_attention_config.json and the report; may be MODEL.")],
    length: Annotated[int, typer.Option(help="Tokens of a text: as long as the prompts to come.")] = 32768,
    samples: Annotated[int, typer.Option(help="Pieces of the text, of this length each.")] = 1,
    recall: Annotated[float, typer.Option(help="Share of its attention that every head has to keep.")] = 0.95,
    verticals: Annotated[int | None, typer.Option(help="Columns to begin with. (default: 1000)")] = None,
    slashes: Annotated[int | None, typer.Option(help="Diagonals to begin with. (default: 6096)")] = None,
    vertical_step: Annotated[int, typer.Option(help="Columns added at a time.")] = 2048,
    slash_step: Annotated[int, typer.Option(help="Diagonals added at a time.")] = 2048,
    *,
    engine: EngineOptions,
    json_output: Json = False,
) -> None:
    """Find how much of a long prompt each head must keep, for sparse prefill.

    Begins with the budgets of --sparse-attention-config, or the same for every head, and widens them.
    """
    _check(model)
    if engine.sparse_prefill != "auto" or engine.sparse_attention_threshold is not None:
        raise ConfigError("--sparse-prefill, --sparse-attention-threshold: calibration reads densely; leave them out")
    is_uniform = verticals is not None or slashes is not None
    if engine.sparse_attention_config is not None and is_uniform:
        raise ConfigError("--sparse-attention-config gives the budgets to begin with; leave --verticals, --slashes out")
    _relaunch(engine.tp * engine.pp)
    from megatron_qwen import ops
    from megatron_qwen.evaluation import sparse_calibration as calibration
    from megatron_qwen.evaluation.perplexity import cut
    from megatron_qwen.inference.sparse_prefill import LAST_ROWS

    config, dense = _config(model), dataclasses.replace(engine, sparse_prefill="off", sparse_attention_config=None)
    sizes = {"num_layers": config.num_hidden_layers, "num_heads": config.num_attention_heads}
    if engine.sparse_attention_config is not None:
        start = ops.SparseAttentionConfig.read(engine.sparse_attention_config, **sizes)
    else:
        most = calibration.VERTICALS if verticals is None else verticals
        start = calibration.uniform_budgets(
            **sizes, verticals=most, slashes=calibration.SLASHES if slashes is None else slashes
        )
    refinement = ops.Refinement(recall, vertical_step, slash_step)
    tokenizer, context = _before_loading(model, dense)
    texts = cut(tokenizer.encode("".join(read_text("--text", file) for file in text)), length=length, samples=samples)
    calibration.check(texts, start, refinement)
    context.require(length - 1, f"--length {length}: the text")
    block = config.dual_chunk_attention
    last_rows = (None if block is None else block.sparse_attention_last_q) or LAST_ROWS
    loaded = dense.load(model)
    with _progress("calibration", 2 * samples * loaded.observations(length), quiet=json_output) as advance:
        heads = calibration.calibrate(loaded, texts, start, refinement, last_rows=last_rows, on_call=advance)
    settings = {
        "text": [str(file) for file in text], "length": length, "samples": samples, "wanted_recall": recall,
        "prefill_chunk_size": loaded.prefill_chunk_size, **_settings(model, context, dense),
    }  # fmt: skip
    _finish(lambda: show_calibration(heads, settings, out, as_json=json_output))


def _name(context: LongContext) -> str:
    sparse = "" if context.sparse is None else "sparse "
    return f"{sparse}{'plain' if context.chunks is None else 'dual chunk'} attention"


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


def _relaunch(ranks: int) -> None:
    from megatron_qwen.parallel.launch import is_rank_process, relaunch_on_local_ranks

    if ranks > 1 and not is_rank_process():
        raise typer.Exit(relaunch_on_local_ranks(sys.argv[1:], ranks))


def _config(model: Path) -> Any:
    from megatron_qwen.conversion.loading import read_config

    return read_config(model)


def _before_loading(model: Path, engine: EngineOptions) -> tuple[Any, LongContext]:
    from megatron_qwen.data.tokenizer import QwenTokenizer

    context = engine.context(model, _config(model))
    return QwenTokenizer.load(model if (model / "config.json").is_file() else model / "hf"), context


def _settings(model: Path, context: LongContext, engine: EngineOptions) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": engine.dtype or _config(model).torch_dtype,
        "layout": {"tp": engine.tp, "pp": engine.pp},
        "dual_chunk_attention": describe_chunks(context),
        "sparse_prefill": describe_sparse(context),
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
