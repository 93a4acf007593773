"""Dual Chunk Attention in models: when it is on, by which positions, and what the attention module hands on."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.build import build_model
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.model.dual_chunk import DualChunk
from megatron_qwen.model.positions import bounds_on_host, rank_positions, sequence_length
from megatron_qwen.model.rope import inverse_frequencies
from megatron_qwen.testing.compare import assert_relative
from megatron_qwen.testing.tiny import tiny_dense

BLOCK = DualChunkAttention(chunk_size=8, local_size=3)
# The example of the 1M report (arXiv 2501.15383, figure 2): chunks of 5, no distance above 7. Row 12 in full.
ROW_12_PAPER = [7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 2, 1, 0]
ROW_12_RELEASED = [8, 7, 6, 5, 4, 7, 6, 5, 4, 3, 2, 1, 0]


def dual_of(block: DualChunkAttention | None = BLOCK, **fields: Any) -> DualChunk:
    found = DualChunk.of(tiny_dense(dual_chunk_attention=block, **fields))
    assert found is not None
    return found


def model_of(block: DualChunkAttention | None, *, layers: int = 1, **fields: Any) -> Any:
    torch.manual_seed(5)
    config = tiny_dense(layers=layers, dual_chunk_attention=block)
    model = build_model(config, dtype=torch.float32, backend="local", **fields)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def tokens_of(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(length))


def logits_and_gradients(model: Any, tokens: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    logits = model(tokens, torch.zeros_like(tokens), None, **options)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    (logits * weights).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def distances(rows: int, *, chunk: int, local: int, cap: int) -> torch.Tensor:
    """The matrix of relative positions, written down row by row from section 3 of arXiv 2402.17463."""
    length = chunk - local
    matrix = torch.zeros(rows, rows, dtype=torch.long)
    for i in range(rows):
        for j in range(i + 1):
            back = i // length - j // length
            query = [i % length, min(i % length + length, cap), min(2 * length - 1, cap)][min(back, 2)]
            matrix[i, j] = query - j % length
    return matrix


def by_the_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, matrix: torch.Tensor, theta: float, scale: torch.Tensor
) -> torch.Tensor:
    """[S, B, N D] from raw heads [S, B, N | G, D], every pair of tokens rotated by its distance; fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    half = q.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), matrix[..., None] * frequencies)
    as_complex = [torch.complex(x[..., :half], x[..., half:]) for x in (q, k)]
    scores = torch.einsum("sbnd,tbnd,std->bnst", as_complex[0], as_complex[1].conj(), turn).real * q.shape[-1] ** -0.5
    rows = q.shape[0]
    scores = (scores * scale[:, None]).masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v).flatten(2)


def test_the_example_of_the_report():
    assert distances(13, chunk=8, local=3, cap=7)[12].tolist() == ROW_12_PAPER
    assert distances(13, chunk=8, local=3, cap=8)[12].tolist() == ROW_12_RELEASED


@pytest.mark.parametrize("original_length", [0, 6])
@pytest.mark.parametrize("cap", ["released", "paper"])
@pytest.mark.parametrize("length", [6, 10, 11, 23])
def test_a_layer_attends_as_the_formula_says(length, cap, original_length):
    block = replace(BLOCK, cap=cap, original_max_position_embeddings=original_length)
    attention = model_of(block).decoder.layers[0].self_attention
    seen: dict[str, torch.Tensor] = {}
    attention.core_attention.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    attention.linear_qkv.register_forward_hook(lambda module, inputs, output: seen.update(packed=output[0]))
    hidden = torch.randn(length, 2, 64, generator=torch.Generator().manual_seed(8))
    angles = torch.outer(torch.arange(length), inverse_frequencies(16, 10_000.0, None)).repeat(1, 2)[:, None, None]
    attention(hidden, None, rotary_pos_emb=angles)
    # Per group of the projection: 2 query heads, a key head, a value head.
    q, k, v = seen["packed"].detach().view(length, 2, 2, 4, 16).split([2, 1, 1], dim=3)
    scale = torch.ones(length).double()
    if original_length:
        scale = torch.tensor([max(1.0, 0.1 * math.log((i + 1) / 6) + 1.0) ** 2 for i in range(length)]).double()
    matrix = distances(length, chunk=8, local=3, cap=8 if cap == "released" else 7)
    expected = by_the_formula(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), matrix, 10_000.0, scale)
    assert_relative(seen["output"].detach(), expected, 1e-5, name=f"length {length}")


def test_up_to_a_chunk_it_is_plain_attention_to_the_bit():
    tokens = tokens_of(5)
    plain, chunked = (logits_and_gradients(model_of(block), tokens) for block in (None, BLOCK))
    assert torch.equal(plain[0], chunked[0])
    assert all(torch.equal(each, chunked[1][name]) for name, each in plain[1].items())
    longer = tokens_of(13)
    plain, chunked = (logits_and_gradients(model_of(block), longer) for block in (None, BLOCK))
    assert torch.allclose(plain[0][:, :5], chunked[0][:, :5], atol=1e-5), "the first chunk never changes"
    # Over a third chunk distances are not the true ones.
    assert (plain[0][:, 10:] - chunked[0][:, 10:]).abs().max() > 1e-3


def test_when_it_is_active():
    dual = dual_of(replace(BLOCK, original_max_position_embeddings=4))
    assert [length for length in range(9) if dual_of().is_active(length)] == [6, 7, 8]
    assert [length for length in range(9) if dual.is_active(length)] == [5, 6, 7, 8]
    assert dual.chunks_at(5) is None
    assert dual.chunks_at(6) == dual.chunks
    assert DualChunk.of(tiny_dense()) is None
    million = DualChunk.of(QwenConfig.from_preset("qwen2.5-7b-instruct-1m"))
    assert million is not None
    assert (million.chunks.stride, million.chunks.limit, million.original_length) == (253_952, 262_144, 262_144)
    assert not million.is_active(253_952)
    assert million.is_active(253_953)


def test_the_temperature_is_that_of_the_tokens_seen():
    dual = dual_of(replace(BLOCK, original_max_position_embeddings=262_144))
    scale = dual.logit_scale(torch.tensor([0, 262_143, 1_009_999]))
    assert scale.tolist() == pytest.approx([1.0, 1.0, 1.28796], rel=1e-5)  # 1.13488 squared, as the 1M models have it
    assert dual_of().logit_scale(torch.arange(4)) is None
    assert [dual.has_temperature(length) for length in (0, 262_144, 262_145)] == [False, False, True]
    assert not dual_of().has_temperature(1 << 30)


def test_frequencies_and_tables_are_those_of_the_formulas():
    plain = 1e6 ** (-torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(inverse_frequencies(64, 1e6, None).double(), plain, rtol=1e-6, atol=0)
    # arXiv 2309.00071, section 3.2: what turns more than beta_fast times stays, less than beta_slow is interpolated.
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=32_768)
    dimensions = [32 * math.log(32_768 / (turns * 2 * math.pi)) / math.log(1e6) for turns in (32.0, 1.0)]
    low, high = math.floor(dimensions[0]), math.ceil(dimensions[1])
    share = ((torch.arange(32).double() - low) / (high - low)).clamp(0, 1)
    expected = plain * (1 - share) + plain / 4.0 * share
    torch.testing.assert_close(inverse_frequencies(64, 1e6, scaling).double(), expected, rtol=1e-6, atol=0)
    mscale = 0.1 * math.log(4.0) + 1.0
    cos, sin = dual_of(rope_scaling=scaling).tables(torch.device("cpu"))
    assert cos.shape == sin.shape == (9, 8)
    assert cos[0].tolist() == pytest.approx([mscale] * 8)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((9, 8), mscale**2))


def test_what_was_read_from_boundaries_is_read_again_when_they_change():
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    cpu = torch.device("cpu")
    first = rank_positions(8, packed, cpu)
    assert rank_positions(8, packed, cpu) is first
    assert (sequence_length(8, packed, 1), bounds_on_host(bounds)) == (4, [0, 4, 8])
    bounds.copy_(torch.tensor([0, 1, 8]))  # the buffer of the next batch
    assert rank_positions(8, packed, cpu).tolist() == [0, *range(7)]
    assert (sequence_length(8, packed, 1), bounds_on_host(bounds)) == (7, [0, 1, 8])


def packed_of(bounds: list[int]) -> PackedSeqParams:
    tensor = torch.tensor(bounds, dtype=torch.int32)
    longest = int(tensor.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=tensor, cu_seqlens_kv=tensor, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def test_packed_sequences_are_attended_one_by_one():
    model, bounds = model_of(replace(BLOCK, original_max_position_embeddings=7), layers=2), [0, 13, 13, 16, 27]
    tokens = tokens_of(27, rows=1)
    together = model(tokens, torch.zeros_like(tokens), None, packed_seq_params=packed_of(bounds))
    for begin, end in ((0, 13), (13, 16), (16, 27)):
        alone = model(tokens[:, begin:end], torch.zeros(1, end - begin, dtype=torch.long), None)
        assert_relative(together[:, begin:end].detach(), alone.detach(), 1e-5, name=f"tokens {begin} to {end}")


def test_positions_of_packed_sequences_start_again():
    packed = packed_of([0, 7, 7, 13])
    positions = rank_positions(13, packed, torch.device("cpu"))
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]
    assert dual_of().key_positions(positions).tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 0]
    assert rank_positions(3, None, torch.device("cpu"), offset=4).tolist() == [4, 5, 6]
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    assert rank_positions(4, None, torch.device("cpu"), group=group).tolist() == [2, 3, 4, 5]
    assert [sequence_length(13, packed, 2), sequence_length(13, None, 2)] == [7, 26]
    assert sequence_length(13, replace(packed, max_seqlen_kv=None), 1) == 7


RECOMPUTE = {
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "layers": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recompute_changes_nothing(name):
    tokens, block = tokens_of(23), replace(BLOCK, original_max_position_embeddings=7)
    kept = logits_and_gradients(model_of(block, layers=2), tokens)
    again = logits_and_gradients(model_of(block, layers=2, **RECOMPUTE[name]), tokens)
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(each, again[1][parameter]) for parameter, each in kept[1].items())


def test_what_it_cannot_have_is_refused():
    tokens = tokens_of(8)
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
    with pytest.raises(ConfigError, match="an attention mask with Dual Chunk Attention"):
        model_of(BLOCK)(tokens, torch.zeros_like(tokens), mask)
    with pytest.raises(ConfigError, match="attention dropout in training with Dual Chunk Attention"):
        model_of(BLOCK, attention_dropout=0.5).train()(tokens, torch.zeros_like(tokens), None)
    attention = model_of(BLOCK).decoder.layers[0].self_attention
    with pytest.raises(ConfigError, match="beyond 5 tokens: got no rotary angles"):
        attention(torch.zeros(6, 2, 64), None)
    with pytest.raises(ConfigError, match="positions that differ between the rows"):
        attention(torch.zeros(6, 2, 64), None, rotary_pos_emb=torch.zeros(6, 2, 1, 16))
