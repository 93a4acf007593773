"""The options of every verb that runs a model, and the engine they describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.inference.engine import Engine
    from megatron_qwen.inference.long_context import LongContext

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

DcaChunkOption = Annotated[
    int | None,
    typer.Option(
        "--dca-chunk-size",
        help="Dual chunk attention: tokens of a chunk with its window, at most the trained length. "
        "[default: config.json's, or off]",
    ),
]
DcaLocalOption = Annotated[
    int | None,
    typer.Option("--dca-local-size", help="Its window, in tokens. [default: config.json's, or chunk size / 16]"),
]
PrefillOption = Annotated[
    int | None,
    typer.Option("--prefill-chunk-size", help="Prompt tokens computed at once, which bounds memory. [default: 4096]"),
]
CacheOption = Annotated[
    int | None,
    typer.Option(
        "--cache-tokens",
        help="Tokens the key-value cache holds; prompts that do not fit wait. [default: all prompts]",
    ),
]


def check_dtype(dtype: str | None) -> None:
    """Raise ConfigError for a dtype that is not among `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: got {dtype!r}, expected one of {sorted(DTYPES)}")


def describe_chunks(context: LongContext) -> dict[str, int] | None:
    """Return Dual Chunk Attention's settings for a JSON report, None for plain attention."""
    if context.chunks is None:
        return None
    sizes = {"chunk_size": context.chunks.chunk_size, "local_size": context.chunks.local_size}
    return {**sizes, "original_length": context.original_length}


def load_engine(
    folder: Path,
    *,
    layout: tuple[int, int],
    dtype: str | None,
    allow_pickle: bool,
    chunk_size: int | None,
    local_size: int | None,
    prefill_chunk_size: int | None,
    cache_tokens: int | None = None,
) -> Engine:
    """Join the ranks of a layout (tp, pp) and load the model in `folder` onto them.

    Raises:
        QwenError: see `Engine.load`.
    """
    import torch

    from megatron_qwen.inference.engine import PREFILL_CHUNK_SIZE, Engine
    from megatron_qwen.parallel import groups
    from megatron_qwen.parallel.layout import ParallelLayout

    parallel = ParallelLayout(tp=layout[0], pp=layout[1])
    groups.initialize(parallel)
    return Engine.load(
        folder,
        layout=parallel,
        dtype=getattr(torch, DTYPES[dtype]) if dtype else None,
        chunk_size=chunk_size,
        local_size=local_size,
        allow_pickle=allow_pickle,
        prefill_chunk_size=PREFILL_CHUNK_SIZE if prefill_chunk_size is None else prefill_chunk_size,
        cache_tokens=cache_tokens,
    )
