"""The adapters of other people's kernels with stand-ins on a CPU: layouts, arguments and returns are those of a device.

The stand-ins have the signatures of torch 2.6 to 2.13 and of `fa3-fwd` 0.0.3, compute in the plainest way, and refuse
what the kernels refuse.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_qwen.benchmark.ops import attention_peers
from megatron_qwen.benchmark.ops.attention_cases import CASES
from megatron_qwen.benchmark.ops.check import check_contestants
from megatron_qwen.benchmark.ops.contestants import OpContestant
from megatron_qwen.benchmark.ops.graphs import graphed

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
PROMPT = {"tokens": 131, "groups": 2, "queries": 7, "head": 64, "chunk": 48, "local": 16}
SIZES = {
    "dca_prefill": PROMPT,
    "dca_train": PROMPT,
    "causal_prefill": {name: PROMPT[name] for name in ("tokens", "groups", "queries", "head")},
    "paged_decode_16": {**PROMPT, "tokens": 144, "batch": 3},
}


def probabilities(q: torch.Tensor, k: torch.Tensor, is_causal: bool, lse: torch.Tensor | None = None) -> Any:
    """Of heads [B, H, S, D] over keys of as many heads, with their lse, or those that this lse makes."""
    assert q.stride(-1) == k.stride(-1) == 1
    assert not is_causal or q.shape[2] == k.shape[2]
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = logits.logsumexp(-1) if lse is None else lse
    return torch.exp(logits - lse[..., None]), lse


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False,
) -> Any:  # fmt: skip
    shared = query.shape[1] // key.shape[1]
    assert shared * key.shape[1] == query.shape[1]
    p, lse = probabilities(query, key.repeat_interleave(shared, 1), is_causal)
    output = p @ value.repeat_interleave(shared, 1)
    as_stored = output.transpose(1, 2).contiguous().transpose(1, 2)
    return as_stored, lse, None, None, query.shape[2], key.shape[2], None, None, None


def flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool, seed: Any, offset: Any,
) -> Any:  # fmt: skip
    assert cum_seq_q is cum_seq_k is None
    assert (max_q, max_k, dropout_p) == (q.shape[2], k.shape[2], 0.0)
    assert lse.shape == q.shape[:3]
    assert lse.is_contiguous()
    shared, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    wide_k, wide_v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    p, _ = probabilities(q, wide_k, is_causal, lse)
    of_logits = p * (grad @ wide_v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    of_k, of_v = of_logits.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad
    return of_logits @ wide_k, *(each.unflatten(1, (-1, shared)).sum(2) for each in (of_k, of_v))


def fa3() -> types.ModuleType:
    """`fa3_fwd_interface`: heads behind tokens; the output alone unless the lse is asked for."""

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None,
                        causal: bool = False, qv: Any = None, *, return_attn_probs: bool = False) -> Any:  # fmt: skip
        output, lse = flash(*(each.transpose(1, 2) for each in (q, k, v)), 0.0, causal)[:2]
        output = output.transpose(1, 2).contiguous()
        return (output, lse) if return_attn_probs else output

    def flash_attn_with_kvcache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Any = None,
                                v: Any = None, *, return_softmax_lse: bool = False) -> Any:  # fmt: skip
        output, lse = flash_attn_func(q, k_cache, v_cache, return_attn_probs=True)
        return (output, lse, torch.empty(0), torch.empty(0)) if return_softmax_lse else output

    module = types.ModuleType("fa3_fwd_interface")
    vars(module).update(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
    return module


@pytest.fixture
def _device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_peers, "_is_on_cpu", lambda tensor: False)
    kernels = {"": flash, "_backward": flash_backward}
    names = {f"_scaled_dot_product_flash_attention{each}": kernel for each, kernel in kernels.items()}
    monkeypatch.setattr(attention_peers, "_ATEN", types.SimpleNamespace(**names))
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", fa3())


def peers_of(name: str) -> list[OpContestant]:
    """All but cuDNN and the flash backend, which no stand-in can be put behind torch's choice of."""
    made = {peer: make() for peer, make in BY_NAME[name].peers.items() if peer not in ("cudnn", "flash")}
    return [OpContestant(name=peer, is_ours=False, function=function) for peer, function in made.items()]


@pytest.mark.usefixtures("_device_kernels")
@pytest.mark.parametrize("name", SIZES)
def test_adapters_give_what_the_definition_gives(name: str) -> None:
    case, contestants = BY_NAME[name], peers_of(name)
    verdicts = check_contestants(case, case.workload(SIZES[name], torch.float32, CPU, 0), contestants)
    assert {who: each.detail for who, each in verdicts.items() if not each.is_right} == {}
    assert len(verdicts) == {"dca_prefill": 3, "dca_train": 1, "causal_prefill": 1, "paged_decode_16": 2}[name]


class Graph:
    """A CUDA graph in the place of one: what is recorded may not look at a number."""

    def replay(self) -> None:
        """Nothing: the outputs of the recording stay."""


@pytest.fixture
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    @contextlib.contextmanager
    def record(graph: Graph) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph, "graph": record,
                        "stream": contextlib.nullcontext}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("_device_kernels", "_graphs")
def test_decoding_by_calls_can_be_recorded_and_what_reads_a_number_says_so() -> None:
    case = BY_NAME["paged_decode_16"]
    workload = case.workload(SIZES["paged_decode_16"], torch.float32, CPU, 0)
    for peer in peers_of("paged_decode_16"):
        assert peer.function is not None
        recorded = graphed(workload, peer)
        assert recorded.function is not None, recorded.missing
        torch.testing.assert_close(recorded.function(), peer.function(**workload.arguments()))
    plain = graphed(workload, OpContestant(name="torch", is_ours=False, function=case.plain))
    assert plain.function is None
    assert plain.missing == (
        "right, but not timed: no CUDA graph of it: operation not permitted when stream is capturing"
    )
