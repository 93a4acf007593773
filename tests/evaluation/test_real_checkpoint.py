"""What Dual Chunk Attention keeps of a trained model, at a setting far below its trained length; minutes on a CPU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_qwen.evaluation.passkey import make_case, run_passkey
from megatron_qwen.evaluation.perplexity import cut, loss_by_window, token_losses
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.long_context import LongContext
from megatron_qwen.parallel import groups

CHECKPOINT = os.environ.get("MEGATRON_QWEN_REAL_CHECKPOINT")
pytestmark = [
    pytest.mark.skipif(CHECKPOINT is None, reason="MEGATRON_QWEN_REAL_CHECKPOINT names no folder"),
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    assert CHECKPOINT is not None
    yield Engine.load(CHECKPOINT, chunk_size=2048, local_size=256, prefill_chunk_size=1024)
    groups.shutdown()


def test_every_window_of_source_code_is_within_a_twentyfifth_of_a_nat_of_full_attention(engine: Engine) -> None:
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    pieces = cut(engine.tokenizer.encode(text), length=6144, samples=1)
    full = engine.attending(LongContext(positions=32768))
    ours, theirs = (loss_by_window(token_losses(each, pieces), window=1024) for each in (engine, full))
    for one, other in zip(ours, theirs, strict=True):
        assert one.loss <= other.loss + 0.04, (one, other)


@pytest.mark.parametrize("length", [4096, 8192])
def test_the_key_is_found_at_every_depth(engine: Engine, length: int) -> None:
    tokenizer = engine.tokenizer
    cases = [make_case(tokenizer, length=length, depth=depth, chat=True) for depth in (0, 0.25, 0.5, 0.75, 1)]  # type: ignore[arg-type]
    wrong = [(each.case.depth, each.answer) for each in run_passkey(engine, cases) if not each.is_correct]
    assert not wrong
