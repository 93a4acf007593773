from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.attention import CoreAttention
from megatron_qwen.testing.compare import assert_close_to_fp64
from megatron_qwen.testing.tiny import tiny_dense

HEADS, GROUPS, HEAD = 6, 2, 16


def core(mask_type: AttnMaskType = AttnMaskType.causal, **fields) -> CoreAttention:
    config = tiny_dense(hidden=HEADS * HEAD, heads=HEADS, kv_heads=GROUPS, **fields).to_transformer_config()
    return CoreAttention(config, 1, mask_type, "self")


def inputs(queries: int, keys: int, batch: int = 2, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    sizes = ((queries, HEADS), (keys, GROUPS), (keys, GROUPS))
    return [torch.randn(n, batch, heads, HEAD, generator=generator).to(dtype).requires_grad_() for n, heads in sizes]


def by_the_formula(q, k, v, masked: torch.Tensor | None) -> torch.Tensor:
    """[S, B, N D] from softmax(q k / sqrt(D)) v with repeated keys; masked [.., S, T] is True where not seen."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * HEAD**-0.5
    if masked is not None:
        scores = scores.masked_fill(masked, float("-inf"))
    return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v).flatten(2)


def future(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (1, 9), (7, 7), (5, 9), (64, 64), (131, 131)])
def test_causal_attention_with_and_without_a_cache(dtype, queries, keys):
    qkv = inputs(queries, keys, dtype=dtype)
    grad = torch.randn(queries, 2, HEADS * HEAD, generator=torch.Generator().manual_seed(9)).to(dtype)
    results = []
    for wide in (dtype, torch.float64):
        wider = [x.detach().to(wide).requires_grad_() for x in qkv]
        out = by_the_formula(*wider, future(queries, keys))
        results.append((out, *torch.autograd.grad(out, wider, grad.to(wide))))
    out = core()(*qkv, None)
    ours = (out, *torch.autograd.grad(out, qkv, grad))
    for name, mine, plain, exact in zip(("output", "dq", "dk", "dv"), ours, *results, strict=True):
        # The fused kernel adds up keys in another order than the formula: a few roundings.
        assert_close_to_fp64(mine, plain, exact, roundings=4, name=name)


def test_a_single_token_attends_to_itself():
    q, k, v = inputs(1, 1)
    out = core()(q, k, v, None)
    torch.testing.assert_close(out, v.repeat_interleave(HEADS // GROUPS, dim=2).flatten(2))
    out.sum().backward()
    assert q.grad.abs().max() < 1e-6


def test_megatrons_no_mask_after_the_prompt_still_hides_the_future():
    q, k, v = inputs(3, 8)
    expected = by_the_formula(q, k, v, future(3, 8))
    ours = core()(q, k, v, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_given_mask_is_the_whole_mask():
    q, k, v = inputs(6, 6)
    left_padding = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    left_padding[1, :, :, :2] = True
    mask = future(6, 6) | left_padding
    ours, expected = core()(q, k, v, mask), by_the_formula(q, k, v, mask)
    torch.testing.assert_close(ours[2:], expected[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 0], expected[:, 0], rtol=1e-5, atol=1e-5)
    assert (ours[:2, 1] == 0).all(), "a query that sees nothing gives zero, not NaN"


def test_packed_sequences_do_not_see_each_other():
    lengths = [5, 1, 9]
    bounds = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    q, k, v = (x.squeeze(1) for x in inputs(15, 15, batch=1))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    ours = core()(q, k, v, None, packed_seq_params=packed)
    parts = zip(*(x.unsqueeze(1).split(lengths) for x in (q, k, v)), lengths, strict=True)
    expected = [by_the_formula(*part, future(n, n))[:, 0] for *part, n in parts]
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_padding_behind_packed_sequences_is_in_memory():
    padded = torch.tensor([0, 8, 12], dtype=torch.int32)
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    q, k, v = (x.squeeze(1) for x in inputs(12, 12, batch=1))
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
    )  # fmt: skip
    ours = core()(q, k, v, None, packed_seq_params=packed)
    assert ours.shape[0] == 12, "every row in memory has its own output, of which those of padding mean nothing"
    for first, last in ((0, 5), (8, 12)):
        expected = by_the_formula(*(x[first:last, None] for x in (q, k, v)), future(last - first, last - first))
        torch.testing.assert_close(ours[first:last], expected[:, 0], rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only():
    attention = core(attention_dropout=0.5)
    q, k, v = inputs(8, 8)
    expected = by_the_formula(q, k, v, future(8, 8))
    torch.testing.assert_close(attention.eval()(q, k, v, None), expected, rtol=1e-5, atol=1e-5)
    dropped = torch.stack([attention.train()(q, k, v, None) for _ in range(400)])
    assert not torch.allclose(dropped[0], dropped[1])
    assert (dropped.mean(0) - expected).abs().mean() < 0.1 * expected.abs().mean() + 0.05


def test_what_it_does_not_do_is_refused():
    q, k, v = inputs(4, 4)
    with pytest.raises(ConfigError, match="attention bias"):
        core()(q, k, v, None, attention_bias=torch.zeros(4, 4))
    config = tiny_dense().to_transformer_config()
    config.context_parallel_size = 2
    with pytest.raises(ConfigError, match=r"cp_comm_type: got 'a2a', expected 'p2p' .* or 'all_gather'"):
        CoreAttention(config, 1, AttnMaskType.causal, "self", cp_comm_type="a2a")
    with pytest.raises(ConfigError, match=r"attention_dropout: got 0\.1; expected 0 with context parallelism"):
        CoreAttention(config, 1, AttnMaskType.causal, "self", attention_dropout=0.1)
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    with pytest.raises(ConfigError, match=r"context_parallel_size: got 2, but the .* group is one of 1 ranks"):
        CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=alone)
