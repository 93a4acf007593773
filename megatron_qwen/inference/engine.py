"""Text from a model: prefill, then one token per row and step, on any TP x PP layout.

Every rank calls `generate` with the same prompts. Each pipeline stage runs its part and hands hidden states
on; the first rank of the last stage chooses the tokens and broadcasts them, so that all ranks hold the same
text and stop together.

Legend: B rows, S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError
from megatron_qwen.inference.cache import KeyValueCache
from megatron_qwen.inference.sampling import Sampler, SamplingParams
from megatron_qwen.parallel.device import current_device

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer; `data.tokenizer.QwenTokenizer` has it."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str:
        """Return the text of `ids`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote after one prompt.

    Attributes:
        text: without control tokens, ended before a stop string.
        token_ids: every token chosen, the stop token included.
        finish_reason: "stop" for a stop token or string, "length" for max_new_tokens or the model's last position.
        logprobs: natural log-probability of each token under the model's unmodified logits.
        prompt_tokens: length of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...]
    prompt_tokens: int


def generate(
    model_chunks: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    params: SamplingParams,
    *,
    vocab_size: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Complete every prompt; all of them are one batch.

    Collective: every rank of the layout calls it with the same arguments and gets the same completions.

    Args:
        model_chunks: this rank's GPTModel, or its list of virtual stages.
        tokenizer: of the model.
        prompts: texts, control tokens written out (see `QwenTokenizer.apply_chat`).
        params: how to choose and when to stop.
        vocab_size: rows of the vocabulary that may be chosen, where the model's is padded; None takes all.
        on_text: called with (prompt index, new text) as text becomes final; on every rank.

    Raises:
        ConfigError: no prompt, an empty one, one longer than the model's positions, one with tokens the
            model does not have, or a model built with sequence parallelism.
    """
    chunks = [_unwrap(chunk) for chunk in (model_chunks if isinstance(model_chunks, Sequence) else [model_chunks])]
    rows = [_Row(tokenizer, tokenizer.encode(prompt), params, index, on_text) for index, prompt in enumerate(prompts)]
    vocab_size, positions = vocab_size or chunks[0].vocab_size, chunks[0].max_sequence_length
    check_prompts([row.prompt for row in rows], positions=positions, vocab_size=vocab_size)
    _check_model(chunks[0], rows)
    room = positions - max(len(row.prompt) for row in rows)
    if room < params.max_new_tokens:
        logger.warning("completions end at the model's last position: %d tokens, not %d", room, params.max_new_tokens)
    # The cache takes rows by ascending length; `index` leads back to the caller's order.
    batch = sorted(rows, key=lambda row: len(row.prompt))
    with _inference(chunks):
        sampler = Sampler(params, [row.prompt for row in batch], vocab_size)
        _complete(chunks, batch, sampler, min(params.max_new_tokens, room))
    return [row.completion() for row in rows]


class _Row:
    """One prompt and what has been written after it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        params: SamplingParams,
        index: int,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.prompt = prompt
        self.index = index
        self.finish_reason: Literal["stop", "length"] | None = None
        self._tokenizer, self._params, self._on_text = tokenizer, params, on_text
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text = ""
        self._shown = 0

    def append(self, token: int, logprob: float, *, is_last: bool) -> None:
        """Take the next token, unless this row is done; find out whether it now is."""
        if self.finish_reason is not None:
            return
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if token in self._params.stop_token_ids:
            self.finish_reason = "stop"
        if self._params.stop or self._on_text:
            self._update_text()
        if is_last and self.finish_reason is None:
            self.finish_reason = "length"
        if self._on_text:
            self._show()

    def _update_text(self) -> None:
        self._text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        ends = [self._text.find(each) for each in self._params.stop if each in self._text]
        if ends:
            self._text = self._text[: min(ends)]
            self.finish_reason = "stop"

    def _show(self) -> None:
        final = len(self._text)
        if self.finish_reason is None:
            # The last character may be half a code point, and the last characters the start of a stop string.
            longest_stop = max((len(each) for each in self._params.stop), default=1)
            final = max(self._shown, len(self._text.rstrip("\ufffd")) - longest_stop + 1)
        if self._on_text and final > self._shown:
            self._on_text(self.index, self._text[self._shown : final])
            self._shown = final

    def completion(self) -> Completion:
        """Return the finished completion."""
        assert self.finish_reason is not None, self.index
        self._update_text()
        return Completion(
            text=self._text,
            token_ids=tuple(self._tokens),
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs),
            prompt_tokens=len(self.prompt),
        )


def check_prompts(prompts: Sequence[Sequence[int]], *, positions: int, vocab_size: int) -> None:
    """Refuse prompts that a model cannot complete; needs no model, so that it can be done before one is loaded.

    Args:
        prompts: token ids of each.
        positions: the model's max_position_embeddings.
        vocab_size: the model's rows.

    Raises:
        ConfigError: no prompt, or one that is empty, too long, or has tokens the model does not have.
    """
    if not prompts:
        raise ConfigError("no prompt was given; expected at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} is empty; expected at least one token")
        if len(prompt) >= positions:
            raise ConfigError(
                f"prompt {index} has {len(prompt):,} tokens; the model has {positions:,} positions, "
                "and at least one is needed for the completion; shorten the prompt"
            )
        if max(prompt) >= vocab_size:
            raise ConfigError(
                f"prompt {index}: token {max(prompt)} is not in the model's vocabulary of {vocab_size:,}; "
                "the tokenizer belongs to another model"
            )


def _check_model(model: Any, rows: Sequence[_Row]) -> None:
    if model.config.sequence_parallel:
        raise ConfigError(
            "the model is built with sequence_parallel; generation decodes one token at a time, load it without"
        )
    if model.config.transformer_impl == "transformer_engine" and len({len(row.prompt) for row in rows}) > 1:
        raise ConfigError(
            "prompts of unequal length: the attention of Transformer Engine takes no mask while decoding with a "
            "static cache; load the model with backend='local', or give the prompts one at a time"
        )


def _unwrap(model: Any) -> Any:
    """Return the GPTModel inside Megatron's wrappers (DDP, Float16Module)."""
    while hasattr(model, "module"):
        model = model.module
    return model


@contextlib.contextmanager
def _inference(chunks: Sequence[Any]) -> Iterator[None]:
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad(), compat.inference_mode():
            yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


def _complete(chunks: Sequence[Any], batch: Sequence[_Row], sampler: Sampler, max_new_tokens: int) -> None:
    """Prefill the rows (ascending by prompt length), then decode until every row is done."""
    device = current_device()
    cache = KeyValueCache([len(row.prompt) for row in batch], max_new_tokens)
    logits_BV = _prefill(chunks, cache, [row.prompt for row in batch])
    cache.align()
    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(cache.rotating_by_position(chunk))
        for written in range(1, max_new_tokens + 1):
            tokens_B, logprobs_B = _choose(sampler, logits_BV, len(batch))
            for row, token, logprob in zip(batch, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
                row.append(token, logprob, is_last=written == max_new_tokens)
            if all(row.finish_reason for row in batch):
                return
            logits_BV = _forward(
                chunks, tokens_B[:, None], cache.positions(device), cache.hidden_slots(device), cache.context
            )
            cache.advance()


def _prefill(chunks: Sequence[Any], cache: KeyValueCache, prompts: Sequence[Sequence[int]]) -> torch.Tensor | None:
    """Fill the cache, prompts of equal length together; return the logits [B, V] after each prompt."""
    device = current_device()
    lengths = [len(prompt) for prompt in prompts]
    logits_BV = []
    for length in sorted(set(lengths)):
        first, count = lengths.index(length), lengths.count(length)
        tokens_BS = torch.tensor([prompts[row] for row in range(first, first + count)], device=device)
        cache.start_prefill(first)
        positions_BS = torch.arange(length, device=device).expand(count, length)
        logits_BV.append(_forward(chunks, tokens_BS, positions_BS, None, cache.context))
    return torch.cat([each for each in logits_BV if each is not None]) if logits_BV[0] is not None else None


def _forward(
    chunks: Sequence[Any],
    tokens_BS: torch.Tensor,
    positions_BS: torch.Tensor,
    hidden_slots: torch.Tensor | None,
    context: Any,
) -> torch.Tensor | None:
    """Run the tokens through all stages; return the last token's logits [B, V] on the last stage, else None."""
    from megatron.core import parallel_state

    batch_size, length = tokens_BS.shape
    output: torch.Tensor | None = None
    for chunk in chunks:
        if not chunk.pre_process:
            hidden_SBH = torch.empty(
                length, batch_size, chunk.config.hidden_size, dtype=chunk.config.pipeline_dtype, device=tokens_BS.device
            )
            dist.recv(hidden_SBH, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden_SBH)
        output = chunk(tokens_BS, positions_BS, hidden_slots, inference_context=context, runtime_gather_output=True)
        if not chunk.post_process:
            assert output is not None
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            output = None
    return None if output is None else output[:, -1]


def _choose(sampler: Sampler, logits_BV: torch.Tensor | None, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Have one rank choose; return tokens (int64 [B]) and log-probabilities (float64 [B]), equal on all ranks."""
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    # Megatron numbers ranks with the pipeline stage outermost: this is the first rank of the last stage.
    chooser = dist.get_world_size() // stages * (stages - 1)
    choice_2B = torch.empty(2, batch_size, dtype=torch.float64, device=current_device())
    if dist.get_rank() == chooser:
        assert logits_BV is not None
        choice_2B[0], choice_2B[1] = sampler(logits_BV[:, : sampler.vocab_size])
    if dist.get_world_size() > 1:
        dist.broadcast(choice_2B, chooser)
    return choice_2B[0].long(), choice_2B[1]
