"""A completion while it is being written, and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_qwen.errors import ConfigError
from megatron_qwen.inference.long_context import LongContext
from megatron_qwen.inference.sampling import SamplingParams


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


class Row:
    """One prompt and what has been written after it.

    Attributes:
        prompt: token ids.
        index: place of the prompt among those of the call.
        max_new_tokens: tokens after which it ends.
        finish_reason: None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        index: int,
        max_new_tokens: int,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.prompt = prompt
        self.index = index
        self.max_new_tokens = max_new_tokens
        self.finish_reason: Literal["stop", "length"] | None = None
        self._tokenizer, self._params, self._on_text = tokenizer, params, on_text
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text = ""
        self._shown = 0

    @property
    def last_token(self) -> int:
        """The token chosen last."""
        return self._tokens[-1]

    @property
    def last_position(self) -> int:
        """Its position in the text."""
        return len(self.prompt) + len(self._tokens) - 1

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and longest completion that go through the model: all but the one chosen last."""
        return len(self.prompt) + self.max_new_tokens - 1

    def append(self, token: int, logprob: float) -> None:
        """Take the next token; find out whether the row is now done."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if token in self._params.stop_token_ids:
            self.finish_reason = "stop"
        if self._params.stop or self._on_text:
            self._update_text()
        if len(self._tokens) == self.max_new_tokens and self.finish_reason is None:
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


def check_prompts(prompts: Sequence[Sequence[int]], *, context: LongContext, vocab_size: int) -> None:
    """Refuse prompts that a model cannot complete; needs no model, so that it can be done before one is loaded.

    Args:
        prompts: token ids of each.
        context: how long a text may be.
        vocab_size: the model's rows.

    Raises:
        ConfigError: no prompt, or one that is empty, too long, or has tokens the model does not have.
    """
    if not prompts:
        raise ConfigError("no prompt was given; expected at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} is empty; expected at least one token")
        context.require(len(prompt), f"prompt {index}")
        if max(prompt) >= vocab_size:
            raise ConfigError(
                f"prompt {index}: token {max(prompt)} is not in the model's vocabulary of {vocab_size:,}; "
                "the tokenizer belongs to another model"
            )
