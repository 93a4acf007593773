"""`megatron-qwen generate`: text from a Hugging Face or Megatron folder, on one rank or many."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli.engine_options import (
    CacheOption,
    EngineOptions,
    describe_chunks,
    describe_sparse,
    with_engine_options,
)
from megatron_qwen.cli.files import read_text
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError

if TYPE_CHECKING:
    from megatron_qwen.data.tokenizer import QwenTokenizer
    from megatron_qwen.inference.completion import Completion
    from megatron_qwen.inference.long_context import LongContext
    from megatron_qwen.inference.sampling import SamplingParams
    from megatron_qwen.model.config import QwenConfig

END_OF_TURN = "<|im_end|>"


def register(app: typer.Typer) -> None:
    """Add the verb `generate`."""
    app.command("generate")(with_engine_options(generate))


def generate(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder, or Megatron checkpoint folder of this project.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given again.")] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="File with one prompt, or .jsonl with one per line (a string or {'prompt': ...})."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's message; use the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens per completion at most. (default: 128)")] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus: smallest set of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many tokens; 0 for all.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1, tokens seen before lose.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws. (default: 0)")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    *,
    engine: EngineOptions,
    nproc: Annotated[int | None, typer.Option(help="Local ranks to start. (default: tp x pp)")] = None,
    cache_tokens: CacheOption = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes (one prompt).")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Continue prompts (from --prompt, --prompt-file or stdin).

    What is not given comes from the folder's generation_config.json: sampling and end tokens.
    Giving --temperature, --top-p or --top-k draws tokens even where the folder says greedy.
    Dual chunk attention is on where the folder's config.json has it, or with --dca-chunk-size; prompts beyond a
    threshold are sparse then where the folder has budgets for it.
    """
    from megatron_qwen.parallel.launch import is_rank_process, relaunch_on_local_ranks

    _check_options(folder, chat=chat, system=system, stream=stream, json_output=json_output)
    ranks = nproc or engine.tp * engine.pp
    if ranks > 1 and not is_rank_process():
        if prompt or prompt_file:
            raise typer.Exit(relaunch_on_local_ranks(sys.argv[1:], ranks))
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as stdin_copy:
            stdin_copy.write(_read_stdin())
            stdin_copy.flush()
            raise typer.Exit(relaunch_on_local_ranks([*sys.argv[1:], "--prompt-file", stdin_copy.name], ranks))
    texts = _read_prompts(prompt or [], prompt_file or [])
    if stream and (json_output or len(texts) != 1):
        raise ConfigError(f"--stream prints one completion as it comes; got {len(texts)} prompts, --json {json_output}")
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "greedy": greedy or None,
        "stop": tuple(stop) if stop else None,
    }
    _run(
        folder,
        texts,
        given,
        chat=chat,
        system=system,
        engine=engine,
        cache_tokens=cache_tokens,
        stream=stream,
        as_json=json_output,
    )


def _check_options(folder: Path, *, chat: bool, system: str | None, stream: bool, json_output: bool) -> None:
    """Refuse what can be refused before anything heavy is imported or any rank started."""
    if system is not None and not chat:
        raise ConfigError("--system is part of a chat; add --chat")
    if stream and json_output:
        raise ConfigError("--stream and --json exclude each other: JSON is printed when all is done")
    if not folder.is_dir():
        raise IncompleteInputError(f"{folder}: no such folder; expected a Hugging Face or Megatron checkpoint folder")


def _read_prompts(prompts: Sequence[str], files: Sequence[Path]) -> list[str]:
    texts = list(prompts)
    for file in files:
        content = read_text("--prompt-file", file)
        texts += _read_jsonl(file, content) if file.suffix == ".jsonl" else [content]
    return texts or [_read_stdin()]


def _read_jsonl(file: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CorruptInputError(f"{file}, line {number}: not JSON: {error}") from error
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise CorruptInputError(
                f"{file}, line {number}: got {line[:80]!r}, expected a string or {{'prompt': text}}"
            )
        texts.append(text)
    return texts


def _read_stdin() -> str:
    text = "" if sys.stdin.isatty() else sys.stdin.read()
    if not text:
        raise ConfigError("no prompt: give --prompt TEXT, --prompt-file FILE, or text on stdin")
    return text


def _run(
    folder: Path,
    texts: Sequence[str],
    given: Mapping[str, Any],
    *,
    chat: bool,
    system: str | None,
    engine: EngineOptions,
    cache_tokens: int | None,
    stream: bool,
    as_json: bool,
) -> None:
    from megatron_qwen.conversion.loading import read_config
    from megatron_qwen.data.tokenizer import QwenTokenizer
    from megatron_qwen.inference.completion import check_prompts
    from megatron_qwen.parallel import groups

    config = read_config(folder)
    tokenizer = QwenTokenizer.load(folder if (folder / "config.json").is_file() else folder / "hf")
    params, sources = _choose_settings(given, tokenizer, config, chat=chat)
    prompts = [_as_chat(tokenizer, text, system) for text in texts] if chat else list(texts)
    # Before the weights are read, which may take minutes.
    context = engine.context(folder, config)
    check_prompts([tokenizer.encode(text) for text in prompts], context=context, vocab_size=config.vocab_size)
    loaded = engine.load(folder, cache_tokens=cache_tokens)
    start = time.perf_counter()
    on_text = _print_now if stream and groups.is_rank_zero() else None
    completions = loaded.generate(prompts, params, on_text=on_text)
    seconds = time.perf_counter() - start
    if groups.is_rank_zero():
        layout = engine.tp, engine.pp
        _show(folder, prompts, completions, params, sources, seconds, layout, context, stream=stream, as_json=as_json)
    groups.shutdown()


def _choose_settings(
    given: Mapping[str, Any], tokenizer: QwenTokenizer, config: QwenConfig, *, chat: bool
) -> tuple[SamplingParams, dict[str, str]]:
    """Return the settings, and for each where it comes from: option, generation_config.json, tokenizer or default."""
    from megatron_qwen.inference.sampling import SamplingParams, read_generation_config

    from_file = read_generation_config(tokenizer.generation_config or {})
    explicit = {name: value for name, value in given.items() if value is not None}
    if "greedy" not in explicit and explicit.keys() & {"temperature", "top_p", "top_k"}:
        explicit["greedy"] = False
    chosen = {**from_file, **explicit}
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    in_file = "generation_config.json" if tokenizer.generation_config is not None else "default"
    sources = {n: "option" if n in explicit else in_file if n in from_file else "default" for n in names}
    if "stop_token_ids" not in chosen:
        own = config.eos_token_id
        chosen["stop_token_ids"] = {tokenizer.eos_id, *((own,) if isinstance(own, int) else own or ())}
        sources["stop_token_ids"] = "config.json and tokenizer"  # noqa: S105 tokens, not secrets
    if chat:
        chosen["stop_token_ids"] = {*chosen["stop_token_ids"], *tokenizer.encode(END_OF_TURN)}
    chosen["stop_token_ids"] = tuple(sorted(chosen["stop_token_ids"]))
    return SamplingParams(**chosen), sources


def _as_chat(tokenizer: QwenTokenizer, text: str, system: str | None) -> str:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return tokenizer.apply_chat([*messages, {"role": "user", "content": text}])


def _print_now(_index: int, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show(
    folder: Path,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    params: SamplingParams,
    sources: Mapping[str, str],
    seconds: float,
    layout: tuple[int, int],
    context: LongContext,
    *,
    stream: bool,
    as_json: bool,
) -> None:
    from rich.console import Console

    new_tokens = sum(len(each.token_ids) for each in completions)
    settings = dataclasses.asdict(params)
    if as_json:
        record = {
            "model": str(folder),
            "layout": {"tp": layout[0], "pp": layout[1]},
            "dual_chunk_attention": describe_chunks(context),
            "sparse_prefill": describe_sparse(context),
            "sampling": {name: {"value": settings[name], "from": sources[name]} for name in settings},
            "completions": [
                {"prompt": text, **dataclasses.asdict(each)} for text, each in zip(prompts, completions, strict=True)
            ],
            "seconds": seconds,
            "tokens_per_second": new_tokens / seconds,
        }
        sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if stream:
        console.print()
    for text, each in zip(prompts, completions, strict=True):
        if len(completions) > 1:
            console.print(text, style="dim", end="")
        if not stream:
            console.print(each.text)
    how = "greedy" if params.is_greedy else f"temperature {params.temperature:g}, seed {params.seed}"
    footer = f"{new_tokens} tokens in {seconds:.1f} s ({new_tokens / seconds:.1f} tokens/s), {how}"
    Console(stderr=True, highlight=False).print(footer, style="dim")
