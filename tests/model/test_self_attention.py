"""QwenSelfAttention against Megatron-Core's own, which adds the bias, splits and rotates in steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention

from megatron_qwen import ops
from megatron_qwen.model import self_attention
from megatron_qwen.model.build import build_model
from megatron_qwen.model.config import QwenConfig, YarnScaling
from megatron_qwen.model.rope import inverse_frequencies
from megatron_qwen.model.self_attention import QwenSelfAttention
from megatron_qwen.testing.tiny import tiny_dense

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16)
MODELS = {
    "plain": tiny_dense(layers=2),
    "one group": tiny_dense(layers=2, kv_heads=1),
    "a group per head": tiny_dense(layers=2, kv_heads=4),
    "yarn": tiny_dense(layers=2, rope_scaling=YARN),
}


class Calls:
    """How often the fused operation ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = ops.qkv_rope

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(self_attention.ops, "qkv_rope", counting)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def model_of(config: QwenConfig, **options: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    model = build_model(config, dtype=torch.float32, backend="local", **options)
    for name, parameter in model.named_parameters():
        if name.endswith("linear_qkv.bias"):
            torch.nn.init.normal_(parameter)
    return model


def in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer take Megatron's own way."""
    monkeypatch.setattr(QwenSelfAttention, "forward", SelfAttention.forward)
    monkeypatch.setattr(QwenSelfAttention, "get_query_key_value_tensors", SelfAttention.get_query_key_value_tensors)


def logits_and_gradients(model, tokens, **inputs) -> list[torch.Tensor]:
    model.zero_grad()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model(tokens, positions, None, **inputs)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_same(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}])
def test_logits_and_every_gradient_equal_megatrons(name, options, calls, monkeypatch):
    model = model_of(MODELS[name], **options)
    tokens = torch.randint(0, 512, (3, 37))
    ours = logits_and_gradients(model, tokens)
    assert calls.count == 2, "one fused operation per layer"
    in_steps(monkeypatch)
    assert_same(ours, logits_and_gradients(model, tokens))
    assert calls.count == 2


def test_full_recompute_runs_the_operation_again(calls, monkeypatch):
    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = model_of(MODELS["plain"], **options)
    model.train()
    tokens = torch.randint(0, 512, (1, 11))
    again = logits_and_gradients(model, tokens)
    assert calls.count == 4
    in_steps(monkeypatch)
    assert_same(again, logits_and_gradients(model, tokens))


def packed(lengths: list[int]) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


@pytest.mark.parametrize("name", ["plain", "yarn"])
def test_packed_sequences_start_at_position_zero_each(name, calls, monkeypatch):
    model = model_of(MODELS[name])
    lengths = [5, 1, 19, 12]
    tokens = torch.randint(0, 512, (1, sum(lengths)))
    ours = logits_and_gradients(model, tokens, packed_seq_params=packed(lengths))
    assert calls.count == 2
    one_by_one = [logits_and_gradients(model, part)[0] for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(ours[0], torch.cat(one_by_one, dim=1), rtol=1e-4, atol=1e-5)
    in_steps(monkeypatch)
    assert_same(ours, logits_and_gradients(model, tokens, packed_seq_params=packed(lengths)))


@pytest.mark.parametrize("name", ["plain", "yarn"])
def test_a_prompt_in_two_parts_and_tokens_after_it_give_the_logits_of_the_whole(name, calls):
    model = model_of(MODELS[name]).eval()
    tokens = torch.randint(0, 512, (2, 23))
    with torch.no_grad():
        whole = model(tokens, torch.arange(23).expand(2, 23), None)
        context = StaticInferenceContext(2, 30)
        context.enable_prefill_mode()
        for begin, end in ((0, 9), (9, 21), (21, 22), (22, 23)):
            context.sequence_len_offset = begin
            positions = torch.arange(begin, end).expand(2, -1)
            logits = model(tokens[:, begin:end], positions, None, inference_context=context, runtime_gather_output=True)
            torch.testing.assert_close(logits[:, -1], whole[:, end - 1], rtol=1e-4, atol=1e-5)
    assert calls.count == 5 * 2


def test_cached_keys_are_rotated_once():
    model = model_of(MODELS["plain"]).eval()
    tokens = torch.randint(0, 512, (1, 7))
    context = StaticInferenceContext(1, 9)
    with torch.no_grad():
        model(tokens, torch.arange(7)[None], None, inference_context=context, runtime_gather_output=True)
        before = context.key_value_memory_dict[1][0][:7].clone()
        context.sequence_len_offset = 7
        context.enable_decode_mode()
        model(tokens[:, :1], torch.tensor([[7]]), None, inference_context=context, runtime_gather_output=True)
    assert torch.equal(context.key_value_memory_dict[1][0][:7], before)
    attention = model.decoder.layers[0].self_attention
    assert attention._rotation is None, "nothing is left behind by a forward pass"


def test_tables_made_while_generating_serve_a_training_step():
    model = model_of(MODELS["plain"])
    tokens = torch.randint(0, 512, (1, 8))
    with torch.inference_mode():
        model(tokens, torch.arange(8)[None], None)
    logits_and_gradients(model, tokens)


def test_what_the_operation_does_not_do_takes_megatrons_way(calls):
    model = model_of(MODELS["plain"])
    for layer in model.decoder.layers:
        layer.self_attention.q_layernorm = torch.nn.LayerNorm(16)
        layer.self_attention._can_fuse = layer.self_attention.can_fuse()
    model(torch.randint(0, 512, (1, 5)), torch.arange(5)[None], None)
    assert calls.count == 0


def test_positions_of_their_own_for_each_row_take_megatrons_way(calls):
    model = model_of(MODELS["plain"])
    attention, hidden = model.decoder.layers[0].self_attention, torch.randn(5, 2, 64)
    angles = torch.outer(torch.arange(7), inverse_frequencies(16, 10_000.0, None)).repeat(1, 2)[:, None, None]
    shifted = torch.cat([angles[:5], angles[2:]], dim=1)
    together, _ = attention(hidden, None, rotary_pos_emb=shifted)
    assert calls.count == 0
    alone, _ = attention(hidden[:, 1:], None, rotary_pos_emb=angles[2:])
    torch.testing.assert_close(together[:, 1:], alone, rtol=1e-5, atol=1e-6)
