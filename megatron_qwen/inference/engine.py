"""Text from a model: prompts in pieces of bounded size, then one token per text and step, on any TP x PP layout.

Every rank makes the same calls with the same prompts. Each pipeline stage runs its part and hands hidden states on; the
first rank of the last stage chooses the tokens and broadcasts them, so that all ranks hold the same texts and stop
together.

Texts share a paged cache (`cache.py`): each is computed at its own positions without padding, leaves when it is done,
and its pages serve the next one that waits.

Shapes: R texts of a step, T tokens, V vocabulary.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_qwen.errors import ConfigError
from megatron_qwen.inference.cache import PAGE_SIZE, CacheShape, PagedCache
from megatron_qwen.inference.completion import Completion, Row, Tokenizer, check_prompts
from megatron_qwen.inference.forward import PagedForward, Segment
from megatron_qwen.inference.long_context import LongContext
from megatron_qwen.inference.sampling import Sampler, SamplingParams
from megatron_qwen.inference.sparse_prefill import PromptAttention, SparseRequest
from megatron_qwen.parallel.device import current_device

if TYPE_CHECKING:
    from megatron_qwen.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

PREFILL_CHUNK_SIZE = 4096
"""Prompt tokens of one call: 7B's widest activation takes 0.3 GB in bf16 then, not the 74 GB of 1M tokens at once."""


class Engine:
    """A loaded model that completes prompts and scores texts, call after call.

    Attributes:
        tokenizer: of the model.
        context: how far texts go, and how attention works there.
        prefill_chunk_size: prompt tokens of one call of the model at most.
    """

    def __init__(
        self,
        model_chunks: Any,
        tokenizer: Tokenizer,
        *,
        context: LongContext | None = None,
        vocab_size: int | None = None,
        prefill_chunk_size: int = PREFILL_CHUNK_SIZE,
        cache_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        """Take a model that is built.

        Args:
            model_chunks: this rank's GPTModel, or its list of virtual stages; of any backend.
            tokenizer: of the model.
            context: the one the model was built with if None.
            vocab_size: rows of the vocabulary that may be chosen, where the model's is padded; None takes all.
            prefill_chunk_size: prompt tokens of one forward call at most: the bound of activation memory.
            cache_tokens: tokens of the key-value cache; prompts that do not fit wait for others. None makes room for
                all prompts of a call at once.
            page_size: tokens of a page of the cache.

        Raises:
            ConfigError: sizes below one, or a model built with sequence or context parallelism.
        """
        chunks = model_chunks if isinstance(model_chunks, Sequence) else [model_chunks]
        self._chunks = [_unwrap(chunk) for chunk in chunks]
        self.tokenizer = tokenizer
        self.context = context or LongContext.of_built(self._chunks[0])
        self._vocab_size: int = vocab_size or self._chunks[0].vocab_size
        self.prefill_chunk_size, self._cache_tokens = prefill_chunk_size, cache_tokens
        for name, value in (("prefill_chunk_size", prefill_chunk_size), ("cache_tokens", cache_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        config = self._chunks[0].config
        for name in ("sequence_parallel", "context_parallel_size"):
            if getattr(config, name) > 1 or getattr(config, name) is True:
                raise ConfigError(
                    f"the model is built with {name} {getattr(config, name)}; generation decodes one token at a "
                    "time, load it without"
                )
        layers = [layer.self_attention for chunk in self._chunks for layer in chunk.decoder.layers]
        self._cache_shape = CacheShape(
            num_layers=len(layers),
            num_heads=layers[0].num_query_groups_per_partition if layers else 0,
            head_dim=config.kv_channels,
            dtype=config.params_dtype,
            page_size=page_size,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        layout: ParallelLayout | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        local_size: int | None = None,
        sparse: SparseRequest | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> Engine:
        """Load a model and its tokenizer from a Hugging Face or Megatron folder.

        Args:
            folder: as `load_model` takes it.
            layout: parallel sizes; those that run, or one rank.
            dtype: of the parameters; None takes config.json's.
            chunk_size: see `LongContext.of_model`.
            local_size: likewise.
            sparse: likewise.
            allow_pickle: open weights that are pickles, as plain data.
            options: further arguments of the engine.

        Raises:
            ConfigError: see `LongContext.of_model` and the engine itself.
            InputError: the folder holds no model or tokenizer.
        """
        from megatron_qwen.conversion.loading import load_model, read_config
        from megatron_qwen.data.tokenizer import QwenTokenizer

        path = Path(folder)
        config = read_config(path)
        context = LongContext.of_model(config, chunk_size=chunk_size, local_size=local_size, folder=path, sparse=sparse)
        tokenizer = QwenTokenizer.load(path if (path / "config.json").is_file() else path / "hf")
        model = load_model(path, dtype=dtype, layout=layout, backend="local", allow_pickle=allow_pickle)
        return cls(model, tokenizer, context=context, vocab_size=config.vocab_size, **options)

    def attending(self, context: LongContext) -> Engine:
        """Return an engine of the same model that attends in another way."""
        other = copy.copy(self)
        other.context = context
        return other

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt.

        Collective: every rank of the layout calls it with the same arguments and gets the same completions.

        Args:
            prompts: texts, control tokens written out (see `QwenTokenizer.apply_chat`).
            params: how to choose and when to stop.
            on_text: called with (prompt index, new text) as text becomes final; on every rank.

        Raises:
            ConfigError: no prompt, an empty one, one longer than the model's positions, one with tokens the model does
                not have, or not enough memory for its keys and values.
        """
        rows = self._rows(prompts, params, on_text)
        for _ in self._steps(rows, params):
            pass
        return [row.completion() for row in rows]

    def stream(self, prompts: Sequence[str], params: SamplingParams) -> Iterator[tuple[int, str]]:
        """Yield (prompt index, new text) as text becomes final; arguments, errors and ranks as in `generate`."""
        pieces: collections.deque[tuple[int, str]] = collections.deque()
        rows = self._rows(prompts, params, lambda index, text: pieces.append((index, text)))
        for _ in self._steps(rows, params):
            while pieces:
                yield pieces.popleft()

    def token_losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return -log p of every token but the first, given those before it: fp32 [T - 1] on the CPU, in nats.

        Collective. Memory as in prefill: no logits are held.

        Raises:
            ConfigError: fewer than two tokens, more than the model has positions, or too little memory.
        """
        if len(tokens) < 2:
            raise ConfigError(f"token_losses: got {len(tokens)} tokens, expected at least 2")
        check_prompts([tokens[:-1]], context=self.context, vocab_size=self._vocab_size)
        losses = []
        with _evaluating(self._chunks):
            for new, hidden in self._read(tokens[:-1]):
                part = torch.empty(len(new), device=current_device())
                if hidden is not None:
                    labels = torch.tensor([tokens[new.start + 1 : new.stop + 1]], device=hidden.device)
                    part.copy_(self._chunks[-1].compute_fused_loss(hidden, labels)[0])
                losses.append(_from_last_stage(part).cpu())
        return torch.cat(losses)

    def watch(self, tokens: Sequence[int], observer: Callable[[PromptAttention], None]) -> None:
        """Read a text as a prompt and show an observer the attention of every layer of this rank, piece by piece.

        Collective, as `generate`.

        Args:
            tokens: ids of the text.
            observer: called in the order of pieces, then layers; what it gets is the engine's and changes afterwards.

        Raises:
            ConfigError: a text without tokens, or see `generate`.
        """
        check_prompts([tokens], context=self.context, vocab_size=self._vocab_size)
        with _evaluating(self._chunks):
            for _ in self._read(tokens, observer):
                pass

    def observations(self, tokens: int) -> int:
        """Return how often `watch` calls the observer of this rank for a text of so many tokens."""
        return self._cache_shape.num_layers * -(-tokens // self.prefill_chunk_size)

    def _read(
        self, tokens: Sequence[int], observer: Callable[[PromptAttention], None] | None = None
    ) -> Iterator[tuple[range, torch.Tensor | None]]:
        """Prefill one text; yield positions, and on the last stage their hidden states, piece by piece."""
        cache, forward = self._prepare(len(tokens), len(tokens), observer)
        cache.admit(0, len(tokens))
        for start in range(0, len(tokens), self.prefill_chunk_size):
            new = range(start, min(start + self.prefill_chunk_size, len(tokens)))
            segment = Segment(
                sequence=0, tokens=tokens[new.start : new.stop], start=new.start, prompt_tokens=len(tokens)
            )
            yield new, forward.hidden([segment])

    def _rows(
        self, prompts: Sequence[str], params: SamplingParams, on_text: Callable[[int, str], None] | None
    ) -> list[Row]:
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        check_prompts(encoded, context=self.context, vocab_size=self._vocab_size)
        rows = []
        for index, prompt in enumerate(encoded):
            room = params.max_new_tokens
            if self.context.positions is not None and self.context.positions - len(prompt) < room:
                room = self.context.positions - len(prompt)
                logger.warning(
                    "prompt %d: the completion ends at the model's last position: %d tokens, not %d",
                    index, room, params.max_new_tokens,
                )  # fmt: skip
            rows.append(Row(self.tokenizer, prompt, params, index, room, on_text))
        return rows

    def _steps(self, rows: Sequence[Row], params: SamplingParams) -> Iterator[None]:
        """Complete the rows; yield after every token that each of the present ones gets."""
        all_tokens = sum(self._cache_shape.pages_for(row.most_tokens) for row in rows) * self._cache_shape.page_size
        sampler = Sampler(params, [row.prompt for row in rows], self._vocab_size)
        waiting, active = collections.deque(rows), list[Row]()
        cache, forward = self._prepare(self._cache_tokens or all_tokens, max(row.most_tokens for row in rows))
        while waiting or active:
            fresh = _admit(waiting, cache)
            with _evaluating(self._chunks):
                logits = [*self._prefill(forward, fresh), *_decode(forward, active)]
                active = [*fresh, *active]
                tokens_R, logprobs_R = _choose(sampler, logits, [row.index for row in active])
            for row, token, logprob in zip(active, tokens_R.tolist(), logprobs_R.tolist(), strict=True):
                row.append(token, logprob)
                if row.finish_reason:
                    cache.release(row.index)
            active = [row for row in active if not row.finish_reason]
            yield

    def _prepare(
        self, cache_tokens: int, most_tokens: int, observer: Callable[[PromptAttention], None] | None = None
    ) -> tuple[PagedCache, PagedForward]:
        cache = PagedCache(self._cache_shape, self._cache_shape.pages_for(cache_tokens), current_device())
        return cache, PagedForward(self._chunks, cache, self.context, most_tokens, observer)

    def _prefill(self, forward: PagedForward, rows: Sequence[Row]) -> Iterator[torch.Tensor | None]:
        """Compute the rows' prompts in calls of at most `prefill_chunk_size` tokens; yield logits in their order.

        A sparse prompt has calls of its own: what is kept of it depends on where it is cut, so not on its neighbours.
        """
        segments: list[Segment] = []
        wanted: list[int] = []
        room = self.prefill_chunk_size
        for row, following in itertools.zip_longest(rows, rows[1:]):
            is_alone = any(each and self.context.is_sparse(len(each.prompt)) for each in (row, following))
            start, end = 0, len(row.prompt)
            while start < end:
                tokens = row.prompt[start : start + room]
                segments.append(Segment(sequence=row.index, tokens=tokens, start=start, prompt_tokens=end))
                start += len(tokens)
                room -= len(tokens)
                if start == end:
                    wanted.append(len(segments) - 1)
                if not room or (start == end and (following is None or is_alone)):
                    yield forward.logits(segments, wanted)
                    segments, wanted, room = [], [], self.prefill_chunk_size


def generate(
    model_chunks: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    vocab_size: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Complete every prompt with a model that is at hand; all of them are one batch.

    Args:
        model_chunks: this rank's GPTModel, or its list of virtual stages.
        tokenizer: of the model.
        prompts: see `Engine.generate`; likewise params, on_text, ranks and errors.
        params: how to choose and when to stop.
        vocab_size: see `Engine`.
        on_text: called with new text.
        options: further arguments of `Engine`.
    """
    engine = Engine(model_chunks, tokenizer, vocab_size=vocab_size, **options)
    return engine.generate(prompts, params, on_text=on_text)


def _unwrap(model: Any) -> Any:
    """Return the GPTModel inside Megatron's wrappers (DDP, Float16Module)."""
    while hasattr(model, "module"):
        model = model.module
    return model


@contextlib.contextmanager
def _evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    """Nothing is dropped out or kept for gradients; a model in training goes back to training."""
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


def _admit(waiting: collections.deque[Row], cache: PagedCache) -> list[Row]:
    """Take waiting rows into the cache, in order, as far as pages are free."""
    admitted = []
    while waiting and cache.can_admit(waiting[0].most_tokens):
        row = waiting.popleft()
        cache.admit(row.index, row.most_tokens)
        admitted.append(row)
    return admitted


def _decode(forward: PagedForward, rows: Sequence[Row]) -> Iterator[torch.Tensor | None]:
    """Yield the logits behind each row's last token."""
    if rows:
        segments = [Segment(sequence=row.index, tokens=[row.last_token], start=row.last_position) for row in rows]
        yield forward.logits(segments, range(len(rows)))


def _choose(
    sampler: Sampler, logits: Sequence[torch.Tensor | None], rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Have one rank choose; return tokens (int64 [R]) and log-probabilities (float64 [R]), equal on all ranks."""
    choice_2R = torch.empty(2, len(rows), dtype=torch.float64, device=current_device())
    if dist.get_rank() == _chooser():
        logits_RV = torch.cat([each for each in logits if each is not None])
        choice_2R[0], choice_2R[1] = sampler(logits_RV[:, : sampler.vocab_size], rows)
    choice_2R = _from_last_stage(choice_2R)
    return choice_2R[0].long(), choice_2R[1]


def _from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor of the first rank of the last pipeline stage; equal on all ranks."""
    if dist.get_world_size() > 1:
        dist.broadcast(tensor, _chooser())
    return tensor


def _chooser() -> int:
    from megatron.core import parallel_state

    stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    # Megatron numbers ranks with the pipeline stage outermost: this is the first rank of the last stage.
    return dist.get_world_size() // stages * (stages - 1)
