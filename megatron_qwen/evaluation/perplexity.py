"""Loss by place: how well a model predicts each window of a long text, given all that comes before it.

A model that loses its way beyond some length shows it as a loss that rises there. A token's loss depends on nothing
behind it, so a text of the longest length has the losses of all shorter ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_qwen.inference.engine import Engine


@dataclass(frozen=True, kw_only=True)
class WindowLoss:
    """The mean loss of a window, over all pieces of text.

    Attributes:
        start: position of its first token.
        end: position behind its last.
        tokens: tokens scored; the first of a text is not, nothing comes before it.
        loss: nats per token.
    """

    start: int
    end: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def cut(tokens: Sequence[int], *, length: int, samples: int) -> list[Sequence[int]]:
    """Return the first pieces of `length` tokens, one behind the other.

    Raises:
        ConfigError: there are not so many.
    """
    if length < 2 or samples < 1:
        raise ConfigError(f"perplexity: got length {length}, samples {samples}; expected at least 2 and 1")
    if len(tokens) < length * samples:
        raise ConfigError(
            f"perplexity: the text has {len(tokens):,} tokens; {samples} of {length:,} need {length * samples:,}. "
            "Give a longer text, or ask for less"
        )
    return [tokens[start : start + length] for start in range(0, length * samples, length)]


def token_losses(
    engine: Engine, pieces: Sequence[Sequence[int]], *, on_piece: Callable[[], None] | None = None
) -> torch.Tensor:
    """Return the loss of every token but the first of each piece, fp32 [pieces, length - 1]. Collective.

    Args:
        engine: the model.
        pieces: token ids, all of one length.
        on_piece: called after each.
    """
    import torch

    losses = []
    for piece in pieces:
        losses.append(engine.token_losses(piece))
        if on_piece:
            on_piece()
    return torch.stack(losses)


def loss_by_window(losses: torch.Tensor, *, window: int) -> list[WindowLoss]:
    """Return the means over windows of positions [0, window), [window, 2 window), ...; the last may be shorter.

    Args:
        losses: [pieces, length - 1], of positions 1 and following.
        window: tokens.

    Raises:
        ConfigError: a window below 2 tokens.
    """
    if window < 2:
        raise ConfigError(f"perplexity: got window {window}, expected at least 2 tokens")
    length = losses.shape[1] + 1
    bounds = [*range(0, length, window), length]
    found = []
    for start, end in itertools.pairwise(bounds):
        part = losses[:, max(start, 1) - 1 : end - 1]
        if part.numel():
            found.append(WindowLoss(start=start, end=end, tokens=part.numel(), loss=part.double().mean().item()))
    return found


def loss_by_length(losses: torch.Tensor, lengths: Sequence[int]) -> list[WindowLoss]:
    """Return for each length the mean over all tokens of texts of that length."""
    return [
        WindowLoss(start=0, end=length, tokens=part.numel(), loss=part.double().mean().item())
        for length in lengths
        for part in [losses[:, : length - 1]]
    ]
