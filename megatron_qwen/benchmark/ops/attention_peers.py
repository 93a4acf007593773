"""Attention by other people's kernels: causal, and Dual Chunk Attention as calls per chunk that are merged.

The scheme of calls is what serving engines have done: towards its own chunk, the previous one and older ones, the rows
of a chunk are rotated thrice and attend in a call each; outputs are put together by their log-sum-exps. Rotations are
our fused ones and all heads go into one call, so that nothing but the attention is behind; the merge is
`ops.merge_attention`, which is not fused (some 38 bytes per number where a fused one takes 8).

Shapes: T tokens, S rows, H query heads, G key heads, M = H / G, D head size, B sequences, N tokens of a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_INTRA, _SUCC, _INTER = range(3)
_ATEN = torch.ops.aten


class Kernel(Protocol):
    """Attention of rows [S, H, D] over keys and values [T, G, D] with its log-sum-exp."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output [S, H, D] and lse [H, S]."""
        ...


class Sdpa:
    """The kernels behind torch's `scaled_dot_product_attention` that give the log-sum-exp: FlashAttention 2."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel`."""
        if _is_on_cpu(q):
            heads = _per_group(q, k, v)
            output, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, is_causal)
            return _of_groups(output), lse.flatten(0, 1)
        heads = _as_batch(q, k, v)
        output, lse = _ATEN._scaled_dot_product_flash_attention(*heads, 0.0, is_causal)[:2]
        return output[0].transpose(0, 1), lse[0]

    def backward(self, of_rows: Rows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> Rows:
        """Return the gradients of q, k and v; of_rows: gradient, output [S, H, D] and lse [H, S], over all keys."""
        grad, output, lse = of_rows
        if _is_on_cpu(q):
            outer = _per_group(grad, k, v)[0], *_per_group(q, k, v), _per_group(output, k, v)[0]
            of_q, of_k, of_v = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                *outer, torch.unflatten(lse, 0, (k.shape[1], -1)), 0.0, is_causal
            )
            return _of_groups(of_q), of_k.sum(1).transpose(0, 1), of_v.sum(1).transpose(0, 1)
        batch = [each.transpose(0, 1).unsqueeze(0) for each in (grad, q, k, v, output)]
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # no dropout: nothing reads its seeds
        found = _ATEN._scaled_dot_product_flash_attention_backward(
            *batch, lse.unsqueeze(0), None, None, len(q), len(k), 0.0, is_causal, none, none
        )
        of_q, of_k, of_v = (each[0].transpose(0, 1) for each in found)
        return of_q, of_k, of_v


class FlashAttention3:
    """FlashAttention 3 as package `fa3-fwd` has it: forward only."""

    def __init__(self) -> None:
        """Import it."""
        from fa3_fwd_interface import flash_attn_func, flash_attn_with_kvcache

        self.attend = flash_attn_func
        self.decode = flash_attn_with_kvcache

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel`."""
        output, lse = self.attend(q[None], k[None], v[None], causal=is_causal, return_attn_probs=True)[:2]
        return output[0], lse[0]


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    """Torch has other operations there; tests take a device's with CPU tensors."""
    return tensor.is_cpu


def _per_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Rows:
    """Heads that share keys as heads, key heads as sequences: [G, M, S, D] and, not copied, [G, M, T, D]."""
    groups = k.shape[1]
    q_GMSD = torch.unflatten(q, 1, (groups, -1)).permute(1, 2, 0, 3)
    k_GMTD, v_GMTD = (each.transpose(0, 1).unsqueeze(1).expand(-1, q_GMSD.shape[1], -1, -1) for each in (k, v))
    return q_GMSD, k_GMTD, v_GMTD


def _of_groups(output_GMSD: torch.Tensor) -> torch.Tensor:
    return output_GMSD.permute(2, 0, 1, 3).flatten(1, 2)


def _as_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Rows:
    q_1HSD, k_1GTD, v_1GTD = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
    return q_1HSD, k_1GTD, v_1GTD


@dataclass(frozen=True)
class _Call:
    """Rows and keys of one call."""

    rows: slice
    keys: slice
    variant: int
    is_causal: bool


def _chunks(length: int, stride: int) -> Iterator[list[_Call]]:
    for start in range(0, length, stride):
        rows = slice(start, min(start + stride, length))
        calls = [_Call(rows, rows, _INTRA, True)]
        if start:
            calls.append(_Call(rows, slice(start - stride, start), _SUCC, False))
        if start > stride:
            calls.append(_Call(rows, slice(0, start - stride), _INTER, False))
        yield calls


@dataclass(frozen=True)
class _Rotations:
    """How rows turn towards each kind of chunk, and keys."""

    tables: tuple[torch.Tensor, torch.Tensor]
    of_rows: tuple[torch.Tensor, ...]
    of_keys: torch.Tensor

    @classmethod
    def at(cls, rows: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], layout: ops.ChunkLayout) -> _Rotations:
        within = rows % layout.stride
        succ = (within + layout.stride).clamp(max=layout.limit)
        return cls(tables, (within, succ, torch.full_like(rows, layout.inter_position)), within)

    def turn(self, heads: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        return ops.rope_(heads.clone(), None, *self.tables, positions=positions, inverse=inverse)[0]


def _merged(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: _Rotations, stride: int) -> Any:
    """Return output [T, H, D] and lse [H, T]."""
    variants = [turns.turn(q, positions) for positions in turns.of_rows]
    keys = turns.turn(k, turns.of_keys)
    outputs, lses = [], []
    for calls in _chunks(len(q), stride):
        parts = [kernel.forward(variants[c.variant][c.rows], keys[c.keys], v[c.keys], c.is_causal) for c in calls]
        output, lse = ops.merge_attention([output for output, _ in parts], [lse for _, lse in parts])
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses, 1)


def three_call(kernel: Kernel) -> Function:
    """Return prefill by calls per chunk, all heads in each."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        chunk: int, local: int,
    ) -> torch.Tensor:  # fmt: skip
        layout = ops.ChunkLayout(chunk, local)
        output: torch.Tensor = _merged(kernel, q, k, v, _Rotations.at(rows, (cos, sin), layout), layout.stride)[0]
        return output

    return run


def per_head(kernel: Kernel) -> Function:
    """Return the same as a loop over heads, as vLLM had it."""
    attend = three_call(kernel)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
        shared = q.shape[1] // k.shape[1]
        heads = range(q.shape[1])
        one = [attend(*(x[:, h // n, None] for x, n in ((q, 1), (k, shared), (v, shared))), **rest) for h in heads]
        return torch.cat(one, 1)

    return run


class _ThreeCalls(torch.autograd.Function):
    """Backward is that of every call, given output and lse over all keys, as ring attention has it."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: _Rotations, stride: int
    ) -> torch.Tensor:
        output, lse = _merged(Sdpa(), q, k, v, turns, stride)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.turns, ctx.stride = turns, stride
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, output, lse = ctx.saved_tensors
        turns: _Rotations = ctx.turns
        variants = [turns.turn(q, positions) for positions in turns.of_rows]
        keys = turns.turn(k, turns.of_keys)
        of_variants = [torch.zeros_like(q) for _ in variants]
        of_k, of_v = (torch.zeros_like(each, dtype=lse.dtype) for each in (k, v))
        for calls in _chunks(len(q), ctx.stride):
            for c in calls:
                of_rows = grad[c.rows], output[c.rows], lse[:, c.rows].contiguous()
                heads = variants[c.variant][c.rows], keys[c.keys], v[c.keys]
                of_variants[c.variant][c.rows], more_k, more_v = Sdpa().backward(of_rows, *heads, c.is_causal)
                of_k[c.keys] += more_k
                of_v[c.keys] += more_v
        turned = zip(of_variants, turns.of_rows, strict=True)
        of_q = sum(turns.turn(each, positions, inverse=True) for each, positions in turned)
        of_k = turns.turn(of_k, turns.of_keys, inverse=True)
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None


def three_call_training() -> Function:
    """Return prefill by calls per chunk with a gradient; torch's kernels, `fa3-fwd` has no backward."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        chunk: int, local: int,
    ) -> Any:  # fmt: skip
        layout = ops.ChunkLayout(chunk, local)
        turns = _Rotations.at(rows, (cos, sin), layout)
        return _ThreeCalls.apply(q, k, v, turns, layout.stride)  # type: ignore[no-untyped-call]

    return run


def causal_sdpa(backend: SDPBackend) -> Function:
    """Return torch's causal attention by one backend: asked for by name, since torch's own choice may be the slower."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            output = scaled_dot_product_attention(*_as_batch(q, k, v), is_causal=True, enable_gqa=True)
        return output[0].transpose(0, 1)

    return run


def causal_fa3() -> Function:
    """Return FlashAttention 3's causal attention."""
    kernel = FlashAttention3()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = kernel.attend(q[None], k[None], v[None], causal=True)[0]
        return output

    return run


def _decode_sdpa(q_BHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The query heads of a key head as rows, which see all keys."""
    q_BGMD = torch.unflatten(q_BHD, 1, (k_BTGD.shape[2], -1))
    heads = q_BGMD, k_BTGD.transpose(1, 2), v_BTGD.transpose(1, 2)
    name = f"_scaled_dot_product_flash_attention{'_for_cpu' if _is_on_cpu(q_BHD) else ''}"
    output, lse = getattr(_ATEN, name)(*heads, 0.0, False)[:2]
    return output.flatten(1, 2).unsqueeze(1), lse.flatten(1, 2).unsqueeze(2)


def _decode_fa3() -> Function:
    kernel = FlashAttention3()

    def attend(q_BHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse, *_ = kernel.decode(q_BHD.unsqueeze(1), k_BTGD, v_BTGD, return_softmax_lse=True)
        return output, lse

    return attend


def three_call_decode(*, has_fa3: bool) -> Function:
    """Return decoding by three calls over pages that follow each other, which it need not gather."""
    attend = _decode_fa3() if has_fa3 else _decode_sdpa

    def run(
        q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, page_table: torch.Tensor,
        lengths: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, chunk: int, local: int, longest: int,
    ) -> torch.Tensor:  # fmt: skip
        layout = ops.ChunkLayout(chunk, local)
        own = (longest - 1) // layout.stride * layout.stride
        previous = max(own - layout.stride, 0)
        turns = _Rotations.at(lengths - 1, (cos, sin), layout)
        keys, values = (each.view(len(q), -1, *each.shape[2:]) for each in (key_pages, value_pages))
        parts = []
        for first, last, variant in ((own, longest, _INTRA), (previous, own, _SUCC), (0, previous, _INTER)):
            if first < last:
                turned = turns.turn(q, turns.of_rows[variant])
                parts.append(attend(turned, keys[:, first:last], values[:, first:last]))
        return ops.merge_attention([output for output, _ in parts], [lse for _, lse in parts])[0].squeeze(1)

    return run
