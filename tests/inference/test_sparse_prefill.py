"""Prompts beyond the threshold attend to the pairs that the budgets keep, wherever they are cut; all else is dense."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import MODELS, PROMPTS, enter, write_folder

from megatron_qwen import ops
from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.errors import ConfigError
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.long_context import LongContext
from megatron_qwen.inference.sampling import SamplingParams
from megatron_qwen.inference.sparse_prefill import CONFIG_FILE, SparsePrefill, SparseRequest
from megatron_qwen.model.config import DualChunkAttention, QwenConfig
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense

GREEDY = SamplingParams(greedy=True, max_new_tokens=6)
TEXT = " ".join(PROMPTS * 6)
LENGTH = 230
CHUNKS = {"chunk_size": 32, "local_size": 8}  # chunks of 24
LAYERS, HEADS = MODELS["untied"].num_hidden_layers, MODELS["untied"].num_attention_heads


def budgets(verticals: int, slashes: int) -> ops.SparseAttentionConfig:
    """Of every layer and head others."""
    return ops.SparseAttentionConfig(
        tuple(
            tuple(ops.HeadBudget(verticals + head, slashes + 3 * layer) for head in range(HEADS))
            for layer in range(LAYERS)
        )
    )


FEW, ALL = budgets(31, 50), budgets(1000, 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True, scope="module")
def _leave_groups() -> Iterator[None]:
    yield
    groups.shutdown()


def load(folder: Path, **options: Any) -> Engine:
    enter(ParallelLayout())
    return Engine.load(folder, dtype=torch.float32, **options)


def sparse(engine: Engine, kept: ops.SparseAttentionConfig, threshold: int = 0, last_rows: int = 64) -> Engine:
    prefill = SparsePrefill(budgets=kept, threshold=threshold, last_rows=last_rows)
    return engine.attending(dataclasses.replace(engine.context, sparse=prefill))


def logits(engine: Engine, text: list[int]) -> torch.Tensor:
    """Behind every token of a text that is read as a prompt."""
    found = []
    output_layer = engine._chunks[0].output_layer
    with torch.no_grad():
        for _, hidden in engine._read(text):
            found.append(output_layer(hidden, weight=None)[0][:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("chunks", [CHUNKS, {}], ids=["chunks", "plain"])
def test_budgets_for_everything_give_the_logits_of_dense_prefill(folder: Path, chunks: dict[str, int]) -> None:
    dense = load(folder, **chunks)
    text = dense.tokenizer.encode(TEXT)[:LENGTH]
    expected = logits(dense, text)
    scale = expected.abs().max().item()
    for size in (24, 31, 100, 500):
        if size == 1 and not chunks:
            continue
        cut = load(folder, prefill_chunk_size=size, page_size=7, **chunks)
        found = logits(sparse(cut, ALL), text[: 60 if size == 1 else None])
        assert torch.allclose(found, expected[: len(found)], rtol=0, atol=4e-6 * scale), size
        assert not torch.equal(found, logits(cut, text[: len(found)]))  # another way to the same


@pytest.mark.parametrize("chunks", [CHUNKS, {}], ids=["chunks", "plain"])
def test_few_pairs_change_what_is_beyond_them(folder: Path, chunks: dict[str, int]) -> None:
    dense = load(folder, prefill_chunk_size=31, **chunks)
    text = dense.tokenizer.encode(TEXT)[:LENGTH]
    difference = (logits(sparse(dense, FEW), text) - logits(dense, text)).abs().amax(-1)
    assert difference[:50].max() < 1e-4  # the nearest 50 keys are kept of every row
    assert difference[150:].min() > 1e-4


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `ops.estimate_index` is asked from now on."""
    calls: list[dict[str, Any]] = []
    original = ops.estimate_index

    def estimate(q: torch.Tensor, k: torch.Tensor, of_heads: Any, **options: Any) -> ops.SparseIndex:
        calls.append({"rows": len(q), "keys": len(k), "budgets": tuple(of_heads), **options})
        return original(q, k, of_heads, **options)

    monkeypatch.setattr(ops, "estimate_index", estimate)
    return calls


def test_pairs_are_chosen_per_chunk_of_every_piece_in_prefill_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sparse(load(folder, prefill_chunk_size=31, **CHUNKS), FEW, last_rows=5)
    prompt = engine.tokenizer.decode(engine.tokenizer.encode(TEXT)[:LENGTH])
    length = len(engine.tokenizer.encode(prompt))
    calls = watched(monkeypatch)
    (completion,) = engine.generate([prompt], GREEDY)
    assert len(completion.token_ids) == GREEDY.max_new_tokens
    cuts = sorted({0, length, *range(0, length, 31), *range(0, length, 24)})
    runs = list(itertools.pairwise(cuts))
    assert len(calls) == len(runs) * LAYERS
    for layer in range(LAYERS):
        # Pieces are calls of the model, so their layers come one after the other, with the piece's chunks within.
        of_layer = [each for each in calls if each["budgets"] == FEW.layers[layer]]
        assert [(each["rows"], each["keys"]) for each in of_layer] == [(end - start, end) for start, end in runs]
    assert {each["last_rows"] for each in calls} == {5}
    assert {each["chunks"] for each in calls} == {ops.ChunkLayout.released(32, 8)}
    assert all(each["keys_rotated"] and len(each["tables"][0]) == 2 * 32 - 8 for each in calls)
    scales = [each["logit_scale"] for each in calls if each["logit_scale"] is not None]
    assert all(len(each["logit_scale"]) == each["rows"] for each in calls if each["logit_scale"] is not None)
    assert not scales  # within the trained length


def test_the_temperature_of_a_piece_goes_with_its_rows(folder: Path) -> None:
    engine = load(folder, prefill_chunk_size=31, **CHUNKS)
    hot = engine.attending(dataclasses.replace(engine.context, original_length=16))
    text = engine.tokenizer.encode(TEXT)[:LENGTH]
    expected = logits(hot, text)
    assert torch.allclose(logits(sparse(hot, ALL), text), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_threshold_is_of_the_whole_prompt(folder: Path) -> None:
    engine = load(folder, prefill_chunk_size=31, **CHUNKS)
    text = engine.tokenizer.encode(TEXT)[: LENGTH + 1]
    dense = engine.token_losses(text)
    assert torch.equal(sparse(engine, FEW, threshold=LENGTH).token_losses(text), dense)
    assert not torch.equal(sparse(engine, FEW, threshold=LENGTH - 1).token_losses(text), dense)


def test_a_prompt_is_answered_alike_alone_and_among_others(folder: Path) -> None:
    long = " ".join(PROMPTS * 3)
    prompts = [PROMPTS[0], long, PROMPTS[1], long[7:], PROMPTS[2]]
    engine = sparse(load(folder, prefill_chunk_size=40, **CHUNKS), FEW, threshold=100)
    together = engine.generate(prompts, GREEDY)
    is_long = [each.prompt_tokens > 100 for each in together]
    assert is_long == [False, True, False, True, False]
    for prompt, one in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], GREEDY)
        assert one.token_ids == alone.token_ids
        assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    sizes: list[int] = []
    engine._chunks[0].embedding.register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    engine.generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=1))
    assert max(sizes) == 40
    assert sum(sizes) == sum(each.prompt_tokens for each in together)


MILLION = tiny_dense(
    dual_chunk_attention=DualChunkAttention(chunk_size=64, local_size=8, original_max_position_embeddings=64)
)


def of_block(config: QwenConfig = MILLION, **block: Any) -> QwenConfig:
    assert config.dual_chunk_attention is not None
    return dataclasses.replace(config, dual_chunk_attention=dataclasses.replace(config.dual_chunk_attention, **block))


def test_what_the_model_says_and_what_is_asked(tmp_path: Path) -> None:
    def prefill(config: QwenConfig, folder: Path | None = None, **request: Any) -> SparsePrefill | None:
        return LongContext.of_model(config, folder=folder, sparse=SparseRequest(**request)).sparse

    inline = of_block(sparse_attention_config=FEW.to_json())
    assert prefill(MILLION) is None
    assert prefill(inline) == SparsePrefill(budgets=FEW, threshold=32768, last_rows=64)
    own = of_block(inline, sparse_attention_threshold=0, sparse_attention_last_q=7, sparse_attention_enabled=True)
    assert prefill(own) == SparsePrefill(budgets=FEW, threshold=0, last_rows=7)
    assert prefill(own, threshold=9) == SparsePrefill(budgets=FEW, threshold=9, last_rows=7)
    assert prefill(own, mode="off") is None
    off = of_block(inline, sparse_attention_enabled=False)
    assert prefill(off) is None
    assert prefill(off, mode="on") == prefill(inline)
    # A file beside config.json, in a Hugging Face folder or in a checkpoint's; config.json's own budgets come first.
    beside = tmp_path / "hf"
    beside.mkdir()
    (beside / "config.json").write_text("{}")
    assert prefill(MILLION, tmp_path) is None
    ALL.write(beside / CONFIG_FILE)
    for place in (tmp_path, beside, tmp_path / "release"):
        assert prefill(MILLION, place) == SparsePrefill(budgets=ALL)
    assert prefill(inline, tmp_path) == SparsePrefill(budgets=FEW)
    (tmp_path / "few.json").write_text(json.dumps(FEW.to_json()))
    assert prefill(MILLION, tmp_path, config_file=tmp_path / "few.json") == SparsePrefill(budgets=FEW)
    # Plain attention: only if asked for.
    assert prefill(tiny_dense(), tmp_path) is None
    assert prefill(tiny_dense(), tmp_path, mode="on") == SparsePrefill(budgets=ALL)
    assert prefill(tiny_dense(), config_file=tmp_path / "few.json") == SparsePrefill(budgets=FEW)


@pytest.mark.parametrize(
    ("config", "request_", "message"),
    [
        (MILLION, {"mode": "on"}, r"asked for, and there are no budgets.*eval sparse-calibration MODEL --text"),
        (of_block(sparse_attention_enabled=True), {}, r"sparse_attention_enabled, and there are no budgets"),
        (of_block(sparse_attention_config=FEW.to_json()[:3]), {}, r"sparse_attention_config: .*3 layers; expected 4"),
        (of_block(sparse_attention_config="few.json"), {}, r"sparse_attention_config: .*expected a list over layers"),
        (MILLION, {"config_file": Path("/none.json")}, r"/none.json: No such file"),
        (MILLION, {"mode": "maybe"}, r"got 'maybe', expected one of auto, on, off"),
        (MILLION, {"mode": "off", "threshold": 3}, r"is off, and budgets \(None\) or a threshold \(3\) are given"),
        (MILLION, {"threshold": -1}, r"threshold is -1"),
    ],
)
def test_requests_that_cannot_be_met(config: QwenConfig, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LongContext.of_model(config, sparse=SparseRequest(**request_))


def test_budgets_travel_with_the_weights_and_an_engine_finds_them(folder: Path, tmp_path: Path) -> None:
    FEW.write(folder / CONFIG_FILE)
    try:
        enter(ParallelLayout())
        import_hf(folder, tmp_path / "megatron", progress=False)
        export_hf(tmp_path / "megatron", tmp_path / "hf", progress=False)
        assert (tmp_path / "hf" / CONFIG_FILE).read_bytes() == (folder / CONFIG_FILE).read_bytes()
        for place in (folder, tmp_path / "megatron"):
            engine = load(place, sparse=SparseRequest(threshold=9), **CHUNKS)
            assert engine.context.sparse == SparsePrefill(budgets=FEW, threshold=9)
            assert load(place, sparse=SparseRequest(mode="off"), **CHUNKS).context.sparse is None
            assert load(place).context.sparse is None
    finally:
        (folder / CONFIG_FILE).unlink()
