"""`megatron-qwen data`: train a tokenizer, turn text into `.bin/.idx`, look into the result, measure the speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megatron_qwen.data.prepare import PrepareReport, Progress

SHOWN_SKIPS = 20

Sources = Annotated[list[str], typer.Argument(help="Text, .jsonl[.gz] or .parquet files, and folders of them.")]
TokenizerOption = Annotated[
    Path, typer.Option("--tokenizer", help="Folder with tokenizer.json, such a file, or qwen.tiktoken.")
]
FieldOption = Annotated[str, typer.Option("--jsonl-field", help="JSON field or Parquet column with the text.")]
PatternOption = Annotated[
    list[str] | None,
    typer.Option("--pattern", help='File names to take from folders, such as "*.py"; may be given several times.'),
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out bad records, count and list them.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON report on standard output.")]


def register(app: typer.Typer) -> None:
    """Add the `data` verbs."""
    group = typer.Typer(help="Tokenizers and training data.", no_args_is_help=True)
    group.command("tokenizer")(train_tokenizer)
    group.command("prepare")(prepare_data)
    group.command("inspect")(inspect_data)
    group.command("bench")(bench_data)
    app.add_typer(group, name="data")


def train_tokenizer(
    sources: Sources,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Tokens, the 22 control tokens included.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for tokenizer.json and its companions.")],
    chat: Annotated[bool, typer.Option("--chat", help="End of text is <|im_end|>, as for chat models.")] = False,
    jsonl_field: FieldOption = "text",
    pattern: PatternOption = None,
    skip_bad: SkipBadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a byte-level BPE with Qwen's pre-tokenizer, NFC and control tokens."""
    from megatron_qwen.data.corpus import Corpus
    from megatron_qwen.data.documents import ReadOptions
    from megatron_qwen.data.tokenizer import QwenTokenizer

    with _progress_bar("reading", quiet=as_json) as update:
        corpus = Corpus(sources, ReadOptions(jsonl_field), patterns=pattern, skip_bad=skip_bad, on_progress=update)
        tokenizer = QwenTokenizer.train(corpus, vocab_size)
    tokenizer.save(out, style="chat" if chat else "base")
    report = {
        "out": str(out),
        "vocab_size": tokenizer.vocab_size,
        "documents": corpus.documents,
        "text_bytes": corpus.text_bytes,
        "skipped": corpus.skipped,
        "fingerprint": tokenizer.fingerprint(),
    }
    rows = {
        "tokens": f"{tokenizer.vocab_size:,}",
        "trained on": f"{corpus.documents:,} documents, {_size(corpus.text_bytes)}",
        "<|endoftext|>": f"{tokenizer.eod_id}",
        "end of text": "<|im_end|>" if chat else "<|endoftext|>",
        "fingerprint": tokenizer.fingerprint()[:16],
        "written to": str(out),
    }
    _show("tokenizer", rows, report, corpus.skipped, as_json=as_json)


def prepare_data(
    sources: Sources,
    tokenizer: TokenizerOption,
    out: Annotated[Path, typer.Option("--out", help="Prefix: OUT.bin and OUT.idx are written.")],
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; default: one per core.")] = None,
    jsonl_field: FieldOption = "text",
    pattern: PatternOption = None,
    skip_bad: SkipBadOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")] = False,
    max_document_bytes: Annotated[
        int, typer.Option("--max-document-bytes", help="A longer line or file is a bad record.")
    ] = 64 << 20,
    as_json: JsonOption = False,
) -> None:
    """Turn text, JSONL, Parquet or source code into Megatron's .bin/.idx, <|endoftext|> after each document."""
    from megatron_qwen.data.prepare import prepare
    from megatron_qwen.data.tokenizer import QwenTokenizer

    with _progress_bar("encoding", quiet=as_json) as update:
        report = prepare(
            sources,
            QwenTokenizer.load(tokenizer),
            out,
            workers=workers,
            field=jsonl_field,
            patterns=pattern,
            skip_bad=skip_bad,
            overwrite=overwrite,
            max_document_bytes=max_document_bytes,
            on_progress=update,
        )
    _show("prepared", _prepare_rows(report), report.to_json(), list(report.skipped), as_json=as_json)


def _prepare_rows(report: PrepareReport) -> dict[str, str]:
    rate = report.text_bytes / report.seconds
    return {
        "documents": f"{report.documents:,} from {report.files:,} files",
        "tokens": f"{report.tokens:,} as {report.dtype}",
        "text": f"{_size(report.text_bytes)}, {report.text_bytes / report.tokens:.2f} bytes per token",
        "blank lines and empty files": f"{report.blank:,}",
        "<|endoftext|> inside documents": f"{report.embedded_eod:,}",
        "bad records skipped": f"{len(report.skipped):,}",
        "time": f"{report.seconds:.1f} s, {_size(rate)}/s",
        "written to": f"{report.prefix}.bin, {report.prefix}.idx",
    }


def inspect_data(
    prefix: Annotated[str, typer.Argument(help="Path without .bin.")],
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Check ids and decode with it.")] = None,
    document: Annotated[int, typer.Option("--document", help="Document to show.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check a .bin/.idx whole and show its size, lengths and the begin of a document."""
    from megatron_qwen.data.summary import describe
    from megatron_qwen.data.tokenizer import QwenTokenizer

    report = describe(prefix, QwenTokenizer.load(tokenizer) if tokenizer else None, document=document)
    lengths = report["length"]
    rows = {
        "documents": f"{report['documents']:,}",
        "tokens": f"{report['tokens']:,} as {report['dtype']}",
        "ids": f"{report['smallest_id']} to {report['largest_id']}",
        "tokens per document": f"{lengths['min']:,} / {lengths['median']:,.0f} / {lengths['mean']:,.1f} / "
        f"{lengths['p99']:,.0f} / {lengths['max']:,} (min / median / mean / 99% / max)",
        "unigram entropy": f"{report['unigram_entropy']:.4f} nats per token",
        f"document {document}": repr(report["sample"])[1:-1] if tokenizer else str(report["sample_ids"]),
    }
    _show(prefix, rows, report, [], as_json=as_json)


def bench_data(
    sources: Sources,
    tokenizer: TokenizerOption,
    workers: Annotated[int, typer.Option("--workers", help="Processes of both.")] = 2,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of each, in turn.")] = 3,
    pattern: PatternOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time `data prepare` against bare tokenizers.encode_batch on the same text with as many processes."""
    from megatron_qwen.data.bench import benchmark_prepare
    from megatron_qwen.data.tokenizer import QwenTokenizer

    result = benchmark_prepare(
        sources, QwenTokenizer.load(tokenizer), workers=workers, repeats=repeats, patterns=pattern
    )
    megabytes = result.text_bytes / 1e6
    rows = {
        "text": f"{_size(result.text_bytes)}, {result.tokens:,} tokens, {workers} processes",
        "bare encode_batch": ", ".join(f"{megabytes / s:.2f}" for s in result.bare_seconds) + " MB/s",
        "data prepare": ", ".join(f"{megabytes / s:.2f}" for s in result.prepare_seconds) + " MB/s",
        "ratio of medians": f"{result.ratio:.2f}",
    }
    _show("data prepare against tokenizers", rows, result.to_json(), [], as_json=as_json)


@contextmanager
def _progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on standard error: input bytes, documents, tokens, rate, time left; nothing when not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )
    task = bar.add_task(what, total=None, counts="")

    def update(progress: Progress) -> None:
        counts = f"{progress.documents:,} documents"
        if progress.tokens:
            counts += f", {progress.tokens:,} tokens"
        bar.update(task, completed=progress.bytes_done, total=progress.bytes_total, counts=counts)

    with bar:
        yield update


def _show(title: str, rows: dict[str, str], report: dict[str, Any], skipped: list[str], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    for line in skipped[:SHOWN_SKIPS]:
        console.print(Text(f"skipped {line}"))
    if len(skipped) > SHOWN_SKIPS:
        console.print(f"... and {len(skipped) - SHOWN_SKIPS:,} more; --json lists all")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"
