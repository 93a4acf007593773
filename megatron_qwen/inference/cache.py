"""Keys and values of a batch of prompts of unequal length, in Megatron-Core's own static cache.

Megatron's StaticInferenceContext has one write position for all rows. So that rows of unequal length can
share it, each row is prefilled from slot 0 without padding, then moved right until all rows end in the
same slot:

    prefill:   slot 0 1 2 3 4          aligned:   slot 0 1 2 3 4 | 5 ...
    row 0           a b c . .                          . . a b c | next tokens
    row 1           d e f g h                          d e f g h |

Decoding then hides a row's empty slots and rotates queries and keys by position, not by slot. Layers of the
local backend cache keys rotated by their position in their own text, those of Transformer Engine before
rotation: either way moving them changes nothing.

Legend: B rows, S query tokens, K slots filled so far, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


class KeyValueCache:
    """The static cache of one batch, on this rank.

    Args:
        prompt_lengths: tokens of each row's prompt, in ascending order.
        max_new_tokens: slots to keep behind the longest prompt.

    Attributes:
        context: Megatron's StaticInferenceContext, given to every forward call.
        num_filled: slots filled, in the aligned cache.
    """

    def __init__(self, prompt_lengths: Sequence[int], max_new_tokens: int) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        assert list(prompt_lengths) == sorted(prompt_lengths), prompt_lengths
        self.num_filled = prompt_lengths[-1]
        self._padding_B = torch.tensor([self.num_filled - length for length in prompt_lengths])
        self.context = StaticInferenceContext(len(prompt_lengths), self.num_filled + max_new_tokens)

    @property
    def is_padded(self) -> bool:
        """Whether any row has empty slots."""
        return bool(self._padding_B.any())

    def start_prefill(self, first_row: int) -> None:
        """Have the next forward call fill rows `first_row` and following, from slot 0."""
        self.context.enable_prefill_mode()
        self.context.sequence_len_offset = 0
        self.context.batch_size_offset = first_row

    def align(self) -> None:
        """Move every row right so that all end in slot `num_filled - 1`; the next call decodes all rows."""
        for row, padding in enumerate(self._padding_B.tolist()):
            if padding:
                for memory_KBND in self._memories():
                    memory_KBND[padding : self.num_filled, row] = memory_KBND[: self.num_filled - padding, row].clone()
                    # Hidden, but still multiplied by a weight of zero, which NaN would survive.
                    memory_KBND[:padding, row] = 0
        self.context.batch_size_offset = 0
        self.context.sequence_len_offset = self.num_filled
        self.context.enable_decode_mode()

    def advance(self) -> None:
        """Count the slot that the last decoding call filled."""
        self.num_filled += 1
        self.context.sequence_len_offset = self.num_filled

    def _memories(self) -> Iterator[torch.Tensor]:
        for keys_KBND, values_KBND in self.context.key_value_memory_dict.values():
            yield keys_KBND
            yield values_KBND

    def positions(self, device: torch.device) -> torch.Tensor:
        """Return int64 [B, 1]: the position in its own text of the token that each row decodes next."""
        return (self.num_filled - self._padding_B)[:, None].to(device)

    def hidden_slots(self, device: torch.device) -> torch.Tensor | None:
        """Return bool [B, 1, 1, K + 1], True where a slot is empty; None if no row has empty slots.

        K + 1 counts the slot of the token being decoded.
        """
        if not self.is_padded:
            return None
        slots_K = torch.arange(self.num_filled + 1, device=device)
        return (slots_K[None] < self._padding_B.to(device)[:, None])[:, None, None, :]

    @contextlib.contextmanager
    def rotating_by_position(self, model: Any) -> Iterator[None]:
        """Have `model` (a GPTModel) rotate each row by its own positions while decoding this cache.

        Megatron computes one table of angles [slots, 1, 1, D] for all rows; a forward hook on its rotary
        module makes that [slots, B, 1, D], row b moved down by its padding.
        """
        rotary = getattr(model, "rotary_pos_emb", None)
        if not self.is_padded or not isinstance(rotary, nn.Module):
            yield
            return

        def move_down(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):  # YaRN's module returns (angles, factor)
                return (self._angles_by_row(output[0]), *output[1:])
            return self._angles_by_row(output)

        handle = rotary.register_forward_hook(move_down)
        # The fused kernel of Transformer Engine takes one table for all rows only.
        fusion, model.config.apply_rope_fusion = model.config.apply_rope_fusion, False
        try:
            yield
        finally:
            handle.remove()
            model.config.apply_rope_fusion = fusion

    def _angles_by_row(self, angles_K11D: torch.Tensor) -> torch.Tensor:
        slots_K = torch.arange(angles_K11D.size(0), device=angles_K11D.device)
        positions_KB = (slots_K[:, None] - self._padding_B.to(slots_K)[None]).clamp(min=0)
        return angles_K11D[:, 0, :, :][positions_KB]
