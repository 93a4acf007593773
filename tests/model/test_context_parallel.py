"""Attention and models whose sequences are shared out over ranks, against one rank that has them whole."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import context_ranks
import pytest
import torch
from context_ranks import BOUNDS, GROUPS, HEAD, HEADS, LENGTH, Case, Heads, heads
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.model.gathered_attention import plan_packed
from megatron_qwen.model.ring_attention import _batches
from megatron_qwen.parallel.context import packed_lengths, pieces_of_rank, tokens_of_rank
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.compare import assert_close_to_fp64, assert_relative
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

RANKS = 4
KINDS = ("p2p", "all_gather")
CHUNKS = (13, 5)  # chunks of 8, that cross the pieces of 6 (cp 4) and of 12 (cp 2)
CHUNKED = DualChunkAttention(chunk_size=13, local_size=5, original_max_position_embeddings=10)
MODELS: dict[str, QwenConfig] = {
    "dense": tiny_dense(layers=2),
    "dense-dca": tiny_dense(layers=2, dual_chunk_attention=CHUNKED),
    # The temperature is in the logits beside YaRN's own factor, which is in the tables.
    "yarn-dca": tiny_dense(
        layers=1,
        dual_chunk_attention=CHUNKED,
        rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=16),
    ),
    "moe-dca": tiny_moe(layers=2, mlp_only_layers=(0,), router_aux_loss_coef=0.0, dual_chunk_attention=CHUNKED),
}
ALONE = [
    Case(name=f"{model}{'-packed' if is_packed else ''}", config=config, layout=ParallelLayout(), is_packed=is_packed)
    for model, config in MODELS.items()
    for is_packed in ((False, True) if model.startswith("dense") else (False,))
]


def cases() -> list[Case]:
    """Cases whose name is that of a case in ALONE, what follows a blank left out."""
    found = [
        Case(name=f"{model} cp={cp} {kind}", config=MODELS[model], layout=ParallelLayout(cp=cp),
             fields={"cp_comm_type": kind})
        for model in ("dense", "dense-dca")
        for cp in (2, 4)
        for kind in KINDS
    ]  # fmt: skip
    one = next(case for case in found if case.name == "dense-dca cp=2 p2p")
    gathered = {"cp_comm_type": "all_gather"}
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    tp = ParallelLayout(cp=2, tp=2)
    return [
        *found,
        replace(one, name="dense-dca cp=2 tp=2", layout=tp),
        replace(one, name="dense-dca cp=2 tp=2 sp", layout=replace(tp, sequence_parallel=True), fields=gathered),
        replace(one, name="dense-dca cp=2 selective recompute", fields=recompute),
        replace(one, name="dense-dca cp=2 full recompute", fields={**full, **gathered}),
        *(replace(one, name=f"{name} cp=2", config=MODELS[name]) for name in ("moe-dca", "yarn-dca")),
        *(
            Case(name=f"{name}-packed cp={cp} {kind}", config=MODELS[name], layout=ParallelLayout(cp=cp),
                 is_packed=True, fields={"cp_comm_type": kind})
            for name in ("dense", "dense-dca") for cp in (2, 4) for kind in KINDS
        ),
    ]  # fmt: skip


JOBS = [
    (heads(chunks=chunks, is_packed=is_packed, dtype=torch.float64), kind)
    for chunks in (None, CHUNKS)
    for is_packed in (False, True)
    for kind in KINDS
]
# Without a factor for each row, in which neighbours of one length would differ.
JOBS.append((replace(JOBS[-2][0], logit_scale=None), "p2p"))
JOBS.append((JOBS[0][0], context_ranks.LATE))
JOBS += [(heads(chunks=CHUNKS, is_packed=False, dtype=torch.bfloat16), kind) for kind in KINDS]
SIZES = (2, 4)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {case.name: context_ranks.gradients(case, None) for case in ALONE}


@pytest.fixture(scope="module")
def ranks(alone):
    """Results of all ranks: attention by [rank][size][job], models by [rank][case]."""
    weighted = [(case, alone[case.name.split()[0]]["weights"]) for case in cases()]
    results = run_ranks(context_ranks.everything, RANKS, JOBS, SIZES, weighted, timeout=300)
    return [attention for attention, _ in results], [models for _, models in results]


def on_one_rank(each: Heads) -> tuple[torch.Tensor, ...]:
    """Output, dq, dk and dv of whole sequences."""
    qkv = [tensor.clone().requires_grad_() for tensor in (each.q, each.k, each.v)]
    chunks = None if each.chunks is None else ops.ChunkLayout.released(*each.chunks)
    options: dict[str, Any] = {
        "chunks": chunks,
        "tables": each.tables,
        "keys_rotated": chunks is not None,
        "logit_scale": each.logit_scale,
    }
    if each.q.dim() == 3:
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        output = ops.dual_chunk_attention(*qkv, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)[0]
    else:
        output = ops.dual_chunk_attention(*(x.transpose(0, 1) for x in qkv), **options)[0].transpose(0, 1)
    return output.detach(), *torch.autograd.grad(output, qkv, each.grad)


def in_fp64(each: Heads) -> Heads:
    tensors = {name: getattr(each, name).double() for name in ("q", "k", "v", "grad", "logit_scale")}
    assert each.tables is not None
    return replace(each, **tensors, tables=(each.tables[0].double(), each.tables[1].double()))


def put_together(attention: list[Any], size: int, number: int, place: int, like: torch.Tensor) -> torch.Tensor:
    """Return one result of a job, [S, ...], from the parts of `size` ranks."""
    found = torch.full_like(like, torch.nan)
    for rank in range(size):
        parts = attention[rank][SIZES.index(size)][number]
        found[parts[0]] = parts[place]
    return found


@pytest.mark.multirank
@pytest.mark.parametrize("size", SIZES)
def test_attention_over_ranks_is_that_of_one(size, ranks):
    """In fp64 to its last digits; in bf16 as near to fp64 as one rank comes."""
    for number, (each, kind) in enumerate(JOBS):
        is_exact = each.q.dtype == torch.float64
        whole = on_one_rank(each)
        exact = whole if is_exact else on_one_rank(in_fp64(each))
        for place, name in enumerate(("output", "dq", "dk", "dv")):
            mine = put_together(ranks[0], size, number, place + 1, whole[place])
            name = f"{kind}, {each.q.dtype}, chunks {each.chunks}: {name}"
            if is_exact:
                assert_relative(mine, whole[place], 1e-13, name=name)
            else:
                # Gathered keys: the gradients of the ranks are added up in bf16.
                assert_close_to_fp64(mine, whole[place], exact[place], roundings=4, name=name)


@pytest.mark.multirank
def test_every_gradient_under_context_parallelism_is_that_of_one_rank(ranks, alone):
    for results in ranks[1]:
        for case, result in zip(cases(), results, strict=True):
            expected = alone[case.name.split()[0]]
            assert_relative(result["loss"], expected["loss"], 1e-6, name=f"{case.name}: loss")
            for parameter, whole in expected["grads"].items():
                assert_relative(result["grads"][parameter], whole, 1e-5, name=f"{case.name}: {parameter}")


def expected_positions(case: Case, rank: int) -> list[int]:
    """Positions of a rank's tokens, counted here piece by piece."""
    lengths = [end - begin for begin, end in itertools.pairwise(BOUNDS)] if case.is_packed else [LENGTH]
    found = []
    for length in lengths:
        piece = length // (2 * case.layout.cp)
        for number in (rank, 2 * case.layout.cp - 1 - rank):
            found += range(number * piece, (number + 1) * piece)
    is_chunked = case.config.dual_chunk_attention is not None
    return [position % 8 if is_chunked else position for position in found]


@pytest.mark.multirank
def test_tokens_are_rotated_by_their_own_positions(ranks):
    """Literally: a missing reset of positions changes logits by rounding only, as rotation is relative."""
    for rank, results in enumerate(ranks[1]):
        for case, result in zip(cases(), results, strict=True):
            place = rank // case.layout.tp % case.layout.cp
            assert result["positions"] == expected_positions(case, place), (case.name, rank)


def test_the_comparison_can_fail(alone):
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    plain, chunked = (alone[model]["grads"][name] for model in ("dense", "dense-dca"))
    assert (plain - chunked).norm() > 0.01 * plain.norm(), "chunks change the gradients"
    assert alone["dense-packed"]["positions"][8:12] == [0, 1, 2, 3]


def test_one_rank_attends_as_megatrons_own_module():
    config = tiny_dense(hidden=HEADS * HEAD, heads=HEADS, kv_heads=GROUPS).to_transformer_config(dtype=torch.float32)
    each = heads(chunks=None, is_packed=False, dtype=torch.float32)
    megatron = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    qkv = [tensor.clone().requires_grad_() for tensor in (each.q, each.k, each.v)]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    output = megatron(*qkv, mask)
    theirs = output.detach(), *torch.autograd.grad(output, qkv, each.grad.flatten(2))
    for name, mine, other in zip(("output", "dq", "dk", "dv"), on_one_rank(each), theirs, strict=True):
        assert_relative(mine.view_as(other), other, 1e-5, name=name)


def test_the_pieces_of_a_sequence():
    whole = torch.arange(8)[None].expand(2, 8)
    assert tokens_of_rank(whole, dim=1, rank=0, size=2).tolist() == [[0, 1, 6, 7]] * 2
    assert tokens_of_rank(whole, dim=1, rank=1, size=2).tolist() == [[2, 3, 4, 5]] * 2
    assert tokens_of_rank(whole, dim=1, rank=0, size=1) is whole
    assert sorted(piece for rank in range(3) for piece in pieces_of_rank(rank, 3)) == list(range(6))
    with pytest.raises(ConfigError, match=r"10 tokens; expected a multiple of 2 \* cp = 4"):
        tokens_of_rank(torch.arange(10), dim=0, rank=0, size=2)


def test_packed_sequences_that_cannot_be_cut():
    assert packed_lengths([0, 4, 4, 12], size=2) == (4, 0, 8)
    assert packed_lengths([0], size=2) == ()
    for bounds in ([0, 4, 10], [4, 8], [0, 8, 4], []):
        with pytest.raises(ConfigError, match=r"expected ascending numbers from 0, multiples of 2 \* cp = 4"):
            packed_lengths(bounds, size=2)


def test_the_ring_takes_neighbours_of_one_length_together():
    lengths = (4, 8, 8, 0, 8)
    assert _batches(lengths, 14, 2, has_neighbours=True) == ((1, 2), (2, 4), (1, 0), (1, 4))
    assert _batches(lengths, 14, 2, has_neighbours=False) == ((1, 2), (1, 4), (1, 4), (1, 0), (1, 4))
    with pytest.raises(ConfigError, match="12 tokens on this rank of 2, packed sequences of 28; expected 14 tokens"):
        _batches(lengths, 12, 2, has_neighbours=True)


def test_the_plan_of_packed_sequences():
    plan = plan_packed(torch.tensor([0, 4, 4, 12], dtype=torch.int32), rank=1, size=2)
    # Rank 0 has tokens 0, 3 | 4, 5, 10, 11 and rank 1 has 1, 2 | 6, 7, 8, 9.
    assert plan.order.tolist() == [0, 6, 7, 1, 2, 3, 8, 9, 10, 11, 4, 5]
    assert [each.tolist() for each in plan.rows] == [[0, 2, 3], [1, 4, 5]]
    assert [each.tolist() for each in plan.bounds] == [[0, 1, 1, 3]] * 2
    assert [each.tolist() for each in plan.keys] == [[0, 1, 4, 5, 6, 7], [0, 1, 2, 4, 5, 6, 7, 8, 9]]
    assert [each.tolist() for each in plan.key_bounds] == [[0, 2, 2, 6], [0, 3, 3, 9]]
    assert plan.back.tolist() == [0, 3, 1, 2, 4, 5]
