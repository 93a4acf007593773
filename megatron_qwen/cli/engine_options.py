"""The options of every verb that runs a model, and the engine they describe."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.inference.engine import Engine
    from megatron_qwen.inference.long_context import LongContext
    from megatron_qwen.inference.sparse_prefill import SparseRequest
    from megatron_qwen.model.config import QwenConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

CacheOption = Annotated[
    int | None,
    typer.Option(
        "--cache-tokens",
        help="Tokens the key-value cache holds; prompts that do not fit wait. (default: all prompts)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is loaded and attends. The fields are the options of a verb marked by `with_engine_options`.

    Raises:
        ConfigError: a dtype that is not among `DTYPES`.
    """

    dca_chunk_size: Annotated[
        int | None,
        typer.Option(
            help="Dual chunk attention: tokens of a chunk with its window, at most the trained length; 0 for "
            "plain attention. (default: config.json's, or off)",
        ),
    ] = None
    dca_local_size: Annotated[
        int | None, typer.Option(help="Its window, in tokens. (default: config.json's, or chunk size / 16)")
    ] = None
    prefill_chunk_size: Annotated[
        int | None, typer.Option(help="Prompt tokens computed at once, which bounds memory. (default: 4096)")
    ] = None
    sparse_prefill: Annotated[
        str,
        typer.Option(
            help="Attend to the columns and diagonals that matter of prompts beyond the threshold: auto (with dual "
            "chunk attention, where the model has budgets), on, or off."
        ),
    ] = "auto"
    sparse_attention_config: Annotated[
        Path | None,
        typer.Option(help="File of its budgets, written by eval sparse-calibration. (default: the model's)"),
    ] = None
    sparse_attention_threshold: Annotated[
        int | None, typer.Option(help="Prompts with more tokens are sparse. (default: config.json's, or 32768)")
    ] = None
    tp: Annotated[int, typer.Option("--tp", "--tensor-model-parallel-size", help="Tensor parallel size.")] = 1
    pp: Annotated[int, typer.Option("--pp", "--pipeline-model-parallel-size", help="Pipeline parallel size.")] = 1
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. (default: the folder's own)")] = None
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open weights in pickle files, under an allow-list of plain classes.")
    ] = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: got {self.dtype!r}, expected one of {sorted(DTYPES)}")

    def sparse_request(self) -> SparseRequest:
        """Return what is asked of prompts.

        Raises:
            ConfigError: see `SparseRequest`.
        """
        from megatron_qwen.inference.sparse_prefill import SparseRequest

        return SparseRequest(
            mode=self.sparse_prefill,
            config_file=self.sparse_attention_config,
            threshold=self.sparse_attention_threshold,
        )

    def context(self, folder: Path, config: QwenConfig) -> LongContext:
        """Return how the model in `folder` will attend, without reading its weights.

        Raises:
            ConfigError: see `LongContext.of_model`.
        """
        from megatron_qwen.inference.long_context import LongContext

        return LongContext.of_model(
            config,
            chunk_size=self.dca_chunk_size,
            local_size=self.dca_local_size,
            folder=folder,
            sparse=self.sparse_request(),
        )

    def load(self, folder: Path, *, cache_tokens: int | None = None) -> Engine:
        """Join the ranks of the layout and load the model in `folder` onto them.

        Raises:
            QwenError: see `Engine.load`.
        """
        import torch

        from megatron_qwen.inference.engine import PREFILL_CHUNK_SIZE, Engine
        from megatron_qwen.parallel import groups
        from megatron_qwen.parallel.layout import ParallelLayout

        layout = ParallelLayout(tp=self.tp, pp=self.pp)
        groups.initialize(layout)
        return Engine.load(
            folder,
            layout=layout,
            dtype=getattr(torch, DTYPES[self.dtype]) if self.dtype else None,
            chunk_size=self.dca_chunk_size,
            local_size=self.dca_local_size,
            sparse=self.sparse_request(),
            allow_pickle=self.allow_pickle,
            prefill_chunk_size=PREFILL_CHUNK_SIZE if self.prefill_chunk_size is None else self.prefill_chunk_size,
            cache_tokens=cache_tokens,
        )


def with_engine_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the fields of `EngineOptions` as options, in the place of its parameter `engine`."""
    hints = get_type_hints(EngineOptions, include_extras=True)
    fields = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in dataclasses.fields(EngineOptions)
    ]
    own = get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for each in inspect.signature(verb).parameters.values():
        keyword = each.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own[each.name])
        parameters += fields if each.name == "engine" else [keyword]

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        options = EngineOptions(**{field.name: given.pop(field.name) for field in fields})
        verb(**given, engine=options)

    # What Typer reads, instead of the names in the verb's own signature.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def describe_chunks(context: LongContext) -> dict[str, int] | None:
    """Return Dual Chunk Attention's settings for a JSON report, None for plain attention."""
    if context.chunks is None:
        return None
    sizes = {"chunk_size": context.chunks.chunk_size, "local_size": context.chunks.local_size}
    return {**sizes, "original_length": context.original_length}


def describe_sparse(context: LongContext) -> dict[str, int] | None:
    """Return the settings of sparse prefill for a JSON report, None for dense prefill."""
    if context.sparse is None:
        return None
    return {"threshold": context.sparse.threshold, "last_q": context.sparse.last_rows}
