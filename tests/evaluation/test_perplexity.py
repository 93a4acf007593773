from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.evaluation.perplexity import cut, loss_by_length, loss_by_window
from megatron_qwen.evaluation.plots import draw_losses


def test_windows_are_counted_from_the_first_token_which_has_no_loss(tmp_path: Path) -> None:
    losses = torch.arange(2 * 10, dtype=torch.float32).view(2, 10)  # texts of 11 tokens
    windows = loss_by_window(losses, window=4)
    assert [(each.start, each.end, each.tokens) for each in windows] == [(0, 4, 6), (4, 8, 8), (8, 11, 6)]
    assert [each.loss for each in windows] == [6.0, 9.5, 13.0]
    assert windows[0].perplexity == math.exp(6.0)
    whole = loss_by_length(losses, [4, 11])
    assert [(each.end, each.tokens, each.loss) for each in whole] == [(4, 6, 6.0), (11, 20, 9.5)]
    assert loss_by_window(losses, window=10)[-1].tokens == 2
    draw_losses({"one": windows, "other": windows}, tmp_path / "losses.png", title="test")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_pieces_lie_behind_one_another() -> None:
    assert cut(range(10), length=4, samples=2) == [range(4), range(4, 8)]
    with pytest.raises(ConfigError, match=r"10 tokens; 3 of 4 need 12"):
        cut(range(10), length=4, samples=3)
    with pytest.raises(ConfigError, match="samples 0"):
        cut(range(10), length=4, samples=0)
    with pytest.raises(ConfigError, match="window 1"):
        loss_by_window(torch.zeros(1, 3), window=1)
