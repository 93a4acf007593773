"""Texts beyond one chunk and beyond the trained length: how they are cut, batched and spread changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import MODELS, PROMPTS, enter, write_folder

from megatron_qwen import ops
from megatron_qwen.conversion.loading import load_model
from megatron_qwen.errors import ConfigError
from megatron_qwen.evaluation.sparse_calibration import HeadCalibration, calibrate, uniform_budgets
from megatron_qwen.inference.completion import Completion
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.long_context import LongContext
from megatron_qwen.inference.sampling import SamplingParams
from megatron_qwen.inference.sparse_prefill import SparsePrefill
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.model.dual_chunk import dual_chunk_of
from megatron_qwen.model.rope import inverse_frequencies, model_tables
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf

GREEDY = SamplingParams(greedy=True, max_new_tokens=30)
# Chunks of 24: the longest prompt and its completion cross several.
DUAL_CHUNK = DualChunkAttention(chunk_size=32, local_size=8, original_max_position_embeddings=32)
TEXTS = [*PROMPTS, " ".join(PROMPTS * 3), "x" * 24, "y" * 23, "z" * 97]


def write_dual_chunk_folder(folder: Path, model: str) -> Path:
    write_folder(folder, model)
    config = dataclasses.replace(MODELS[model], max_position_embeddings=32, dual_chunk_attention=DUAL_CHUNK)
    write_tiny_hf(folder, config, seed=5)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {model: write_dual_chunk_folder(root / model, model) for model in ("untied", "moe")}


@pytest.fixture(autouse=True, scope="module")
def _leave_groups() -> Iterator[None]:
    yield
    groups.shutdown()


def load(folder: Path, layout: ParallelLayout | None = None, **options: Any) -> Engine:
    layout = layout or ParallelLayout()
    enter(layout)
    return Engine.load(folder, layout=layout, dtype=torch.float32, **options)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [list(each.token_ids) for each in completions]


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=5e-5)


@pytest.mark.parametrize("model", ["untied", "moe"])
def test_decoded_tokens_have_the_losses_of_one_prefill(folders: dict[str, Path], model: str) -> None:
    engine = load(folders[model])
    for text, completion in zip(TEXTS, engine.generate(TEXTS, GREEDY), strict=True):
        prompt = engine.tokenizer.encode(text)
        losses = engine.token_losses([*prompt, *completion.token_ids])
        assert is_close(-losses[len(prompt) - 1 :], torch.tensor(completion.logprobs)), text


@pytest.mark.parametrize("model", ["untied", "moe"])
def test_prefill_in_pieces_equals_prefill_at_once(folders: dict[str, Path], model: str) -> None:
    engine = load(folders[model])
    text = engine.tokenizer.encode(" ".join(TEXTS))[:150]
    at_once = engine.token_losses(text)
    expected = engine.generate(TEXTS, GREEDY)
    for size, page_size in ((1, 5), (7, 64), (24, 1), (50, 16), (149, 24)):
        cut = load(folders[model], prefill_chunk_size=size, page_size=page_size)
        assert is_close(cut.token_losses(text), at_once), size
        if size in (7, 50):
            assert tokens(cut.generate(TEXTS, GREEDY)) == tokens(expected), size


def test_a_forward_call_never_sees_more_prompt_than_it_may(folders: dict[str, Path]) -> None:
    engine = load(folders["untied"], prefill_chunk_size=31)
    sizes: list[int] = []
    engine._chunks[0].embedding.register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    engine.generate(TEXTS, dataclasses.replace(GREEDY, max_new_tokens=1))
    lengths = [len(engine.tokenizer.encode(text)) for text in TEXTS]
    assert max(sizes) == 31
    assert sum(sizes) == sum(lengths)
    assert len(sizes) == -(-sum(lengths) // 31)
    sizes.clear()
    engine.token_losses(engine.tokenizer.encode(" ".join(TEXTS))[:100])
    assert sizes == [31, 31, 31, 6]


def test_the_training_forward_has_the_same_losses(folders: dict[str, Path]) -> None:
    engine = load(folders["untied"])
    text = engine.tokenizer.encode(" ".join(TEXTS))[:150]
    network = load_model(folders["untied"], dtype=torch.float32, backend="local").eval()
    ids = torch.tensor([text])
    with torch.no_grad():
        logits = network(ids, torch.arange(len(text))[None], None)[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert is_close(engine.token_losses(text), expected)


def test_temperature_and_chunks_each_change_the_losses(folders: dict[str, Path]) -> None:
    engine = load(folders["untied"])
    text = engine.tokenizer.encode(" ".join(TEXTS))[:150]
    both = engine.token_losses(text)
    cold = engine.attending(dataclasses.replace(engine.context, original_length=0)).token_losses(text)
    plain = engine.attending(LongContext(positions=None)).token_losses(text)
    stride, trained = engine.context.chunks.stride, 32  # type: ignore[union-attr]
    assert is_close(both[: trained - 1], cold[: trained - 1])
    assert not is_close(both[trained:], cold[trained:])
    assert is_close(plain[: stride - 1], cold[: stride - 1])
    assert not is_close(plain[stride:], cold[stride:])


def test_tables_are_those_of_training(folders: dict[str, Path], tmp_path: Path) -> None:
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=8)
    config = dataclasses.replace(MODELS["untied"], rope_scaling=yarn, dual_chunk_attention=DUAL_CHUNK)
    scaled = write_tiny_hf(write_folder(tmp_path / "yarn"), config, seed=5)
    for folder in (folders["untied"], scaled):
        (network,) = load(folder)._chunks
        dual = dual_chunk_of(network.config)
        assert dual is not None
        for ours, theirs in zip(model_tables(network, 33, exact=True), dual.tables(torch.device("cpu")), strict=True):
            assert torch.equal(ours, theirs), folder
    cos, _ = model_tables(network, 1_000_001, exact=True)
    angle = 1_000_000 * inverse_frequencies(dual.head_dim, dual.rope_theta, yarn)[1].double()
    assert cos[-1, 1].item() == pytest.approx(angle.cos().item() * yarn.concentration(), abs=1e-6)


def test_a_text_in_one_chunk_is_attended_plainly(folders: dict[str, Path]) -> None:
    engine = load(folders["untied"])
    plain = engine.attending(LongContext(positions=None))
    text = engine.tokenizer.encode("y" * 24)
    assert torch.equal(engine.token_losses(text), plain.token_losses(text))


@pytest.mark.parametrize("model", ["untied", "moe"])
def test_texts_that_wait_for_pages_are_completed_as_if_there_were_room(folders: dict[str, Path], model: str) -> None:
    free = load(folders[model]).generate(TEXTS, GREEDY)
    longest = max(each.prompt_tokens for each in free) + GREEDY.max_new_tokens - 1
    tight = load(folders[model], cache_tokens=longest, page_size=8)
    assert tokens(tight.generate(TEXTS, GREEDY)) == tokens(free)
    sampled = dataclasses.replace(GREEDY, greedy=False, seed=4, repetition_penalty=1.2)
    assert tokens(tight.generate(TEXTS, sampled)) == tokens(load(folders[model]).generate(TEXTS, sampled))
    with pytest.raises(ConfigError, match=rf"{longest:,} tokens needs \d+ pages .* MiB on this rank"):
        load(folders[model], cache_tokens=longest - 8, page_size=8).generate(TEXTS, GREEDY)


def test_an_engine_serves_call_after_call_and_streams(folders: dict[str, Path]) -> None:
    engine = load(folders["untied"])
    first = engine.generate(TEXTS, GREEDY)
    pieces = list(engine.stream(TEXTS, GREEDY))
    assert len(pieces) > 5 * len(TEXTS)
    texts = ["".join(text for index, text in pieces if index == row) for row in range(len(TEXTS))]
    assert texts == [each.text for each in first]
    half = engine.stream(TEXTS, GREEDY)
    assert list(itertools.islice(half, 9)) == pieces[:9]
    half.close()
    assert tokens(engine.generate(TEXTS, GREEDY)) == tokens(first)


LAYOUTS = [ParallelLayout(tp=2), ParallelLayout(pp=2), ParallelLayout(pp=2, vpp=2)]


# Other budgets for every layer and head: a rank that took another's would keep other pairs.
BUDGETS = ops.SparseAttentionConfig(
    tuple(tuple(ops.HeadBudget(31 + 9 * head, 50 + 7 * layer) for head in range(4)) for layer in range(4))
)


def sparse_answers(engine: Engine, text: list[int]) -> tuple[torch.Tensor, list[HeadCalibration]]:
    prefill = SparsePrefill(budgets=BUDGETS, threshold=100, last_rows=8)
    losses = engine.attending(dataclasses.replace(engine.context, sparse=prefill)).token_losses(text)
    refinement = ops.Refinement(0.9, vertical_step=20, slash_step=20)
    return losses, calibrate(
        engine, [text[:120]], uniform_budgets(4, 4, verticals=31, slashes=50), refinement, last_rows=8
    )


def on_rank(folders: dict[str, Path]) -> list[Any]:
    torch.set_num_threads(1)
    answers = []
    for layout in LAYOUTS:
        engine = load(folders["untied"], layout, prefill_chunk_size=40, cache_tokens=200)
        text = engine.tokenizer.encode(" ".join(TEXTS))[:150]
        answers.append(
            (tokens(engine.generate(TEXTS, GREEDY)), engine.token_losses(text), sparse_answers(engine, text))
        )
    return answers


@pytest.mark.multirank
def test_every_layout_has_the_tokens_and_losses_of_one_rank(folders: dict[str, Path]) -> None:
    engine = load(folders["untied"], prefill_chunk_size=40)
    expected = tokens(engine.generate(TEXTS, GREEDY))
    text = engine.tokenizer.encode(" ".join(TEXTS))[:150]
    losses = engine.token_losses(text)
    sparse_losses, heads = sparse_answers(engine, text)
    assert not is_close(sparse_losses, losses)
    for answers in run_ranks(on_rank, 2, folders):
        for layout, (found, found_losses, (found_sparse, found_heads)) in zip(LAYOUTS, answers, strict=True):
            assert found == expected, layout
            assert is_close(found_losses, losses), layout
            assert is_close(found_sparse, sparse_losses), layout
            for one, other in zip(found_heads, heads, strict=True):
                assert dataclasses.astuple(one)[:4] == dataclasses.astuple(other)[:4], layout
                assert dataclasses.astuple(one)[4:] == pytest.approx(dataclasses.astuple(other)[4:], abs=1e-3), layout


def test_where_dual_chunk_attention_comes_from() -> None:
    plain = tiny_dense(max_position_embeddings=256)
    assert LongContext.of_model(plain) == LongContext(positions=256)
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=256)
    assert LongContext.of_model(dataclasses.replace(plain, rope_scaling=yarn)) == LongContext(positions=1024)
    asked = LongContext.of_model(plain, chunk_size=128)
    assert asked == LongContext(positions=None, chunks=ops.ChunkLayout.released(128, 8), original_length=256)
    million = tiny_dense(
        max_position_embeddings=1_010_000,
        dual_chunk_attention=DualChunkAttention(
            chunk_size=262144, local_size=8192, original_max_position_embeddings=262144
        ),
    )
    own = LongContext.of_model(million)
    assert own == LongContext(positions=None, chunks=ops.ChunkLayout.released(262144, 8192), original_length=262144)
    assert LongContext.of_model(million, chunk_size=1000, local_size=10).chunks == ops.ChunkLayout.released(1000, 10)
    (scale,) = own.logit_scale(torch.tensor([1_009_999]))  # type: ignore[misc]
    assert scale.item() == pytest.approx(1.28796, abs=1e-5)  # Qwen2.5-1M's figure for 1,010,000 tokens
    assert own.logit_scale(torch.arange(262144)) is None


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (tiny_dense(), {"local_size": 8}, "local_size is 8 without chunk_size"),
        (tiny_dense(), {"chunk_size": 512}, "chunk_size is 512, the model was trained on 256 tokens"),
        (tiny_dense(), {"chunk_size": 64, "local_size": 64}, "expected 0 <= local_size < chunk_size"),
        (tiny_dense(dual_chunk_attention=DUAL_CHUNK), {"chunk_size": 64}, "trained on 32 tokens"),
    ],
)
def test_chunks_that_make_no_sense_are_refused(config: QwenConfig, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LongContext.of_model(config, **options)


def test_a_model_without_chunks_says_how_to_go_beyond_its_positions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "plain")
    engine = load(folder)
    long = "x" * 300
    with pytest.raises(
        ConfigError, match=r"300 tokens; the model has 256 positions.*--dca-chunk-size 192 --dca-local-size 12"
    ):
        engine.generate([long], GREEDY)
    with pytest.raises(ConfigError, match="256 positions"):
        engine.token_losses(engine.tokenizer.encode(long))
    beyond = load(folder, chunk_size=192, local_size=12)
    (completion,) = beyond.generate([long], GREEDY)
    assert len(completion.token_ids) == GREEDY.max_new_tokens
    with pytest.raises(ConfigError, match="at least 2"):
        beyond.token_losses([3])
    with pytest.raises(ConfigError, match="prefill_chunk_size: got 0"):
        load(folder, prefill_chunk_size=0)
