"""What Dual Chunk Attention keeps of a trained model, at a setting far below its trained length; minutes on a CPU."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_qwen import ops
from megatron_qwen.evaluation.passkey import make_case, run_passkey
from megatron_qwen.evaluation.perplexity import cut, loss_by_window, token_losses
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.long_context import LongContext
from megatron_qwen.inference.sparse_prefill import SparsePrefill
from megatron_qwen.parallel import groups

# Sources of the standard library that are the same to the byte in CPython 3.10 to 3.13.
TEXTS = {
    "difflib": "0c6afc23568d55b3e9ac914f9c5361e3033e778aa5b58d3cc82835fc5c638679",
    "optparse": "07d224301cba312fa0697bff9cd5a4bb4f778a90629632091b3f4ae874d89af5",
}
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


@pytest.mark.parametrize("name", TEXTS)
def test_every_window_of_source_code_is_within_a_twentyfifth_of_a_nat_of_full_attention(
    engine: Engine, name: str
) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    source = Path(file).read_bytes()
    assert hashlib.sha256(source).hexdigest() == TEXTS[name], f"{file}: not the text that this was found on"
    text = source.decode()
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


def test_the_key_is_found_with_sparse_prefill(engine: Engine) -> None:
    file = Path(__file__).parents[2] / "docs" / "long-context" / "sparse_attention_config.json"
    prefill = SparsePrefill(budgets=ops.SparseAttentionConfig.read(file, num_layers=24, num_heads=14), threshold=2048)
    case = make_case(engine.tokenizer, length=4096, depth=0.5, chat=True)
    (answer,) = run_passkey(engine.attending(dataclasses.replace(engine.context, sparse=prefill)), [case])
    assert answer.is_correct, answer.answer
