"""Causal attention with keys and values that go around a ring of context-parallel ranks.

In hop t rank r holds those of rank r - t, and sends them on while it computes. Outputs over parts of the keys are
merged exactly by their log-sum-exps, in fp32; backward goes around once more with the merged ones, and the gradients
of keys and values travel with them, in fp32, until they are home (arXiv 2310.01889). Pieces of keys behind a piece of
queries are not computed: by the zig-zag order of `parallel/context.py`, 3 pairs of pieces are left in the first hop and
2 in each other one, on every rank.

Shapes: s tokens of this rank, p = s / 2 of a piece, B sequences, N query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen import ops
from megatron_qwen.model.gathered_attention import CausalAttention
from megatron_qwen.parallel.context import pieces_of_rank

Rows = slice


def attend_ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: CausalAttention,
    group: dist.ProcessGroup,
    *,
    logit_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the keys of all ranks of `group`, which pass by. Collective; arguments as in `attend_gathered`."""
    keys_values = torch.cat((k, v), dim=-1).transpose(0, 1)
    output: torch.Tensor = _Ring.apply(q.transpose(0, 1), keys_values, logit_scale, attention, group)  # type: ignore[no-untyped-call]
    return output.transpose(0, 1)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BsND: torch.Tensor,
        mine_BsGD: torch.Tensor,
        logit_scale: torch.Tensor | None,
        attention: CausalAttention,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        mine_BsGD = mine_BsGD.contiguous()
        wide = torch.promote_types(q_BsND.dtype, torch.float32)
        output = q_BsND.new_zeros(q_BsND.shape, dtype=wide)
        lse = q_BsND.new_full((q_BsND.shape[0], q_BsND.shape[2], q_BsND.shape[1]), -torch.inf, dtype=wide)
        held = mine_BsGD
        for hop in range(group.size()):
            coming = _Hop(held, group) if hop + 1 < group.size() else None
            for rows, keys, starts in _pairs(group, hop, q_BsND.shape[1] // 2):
                k, v = held[:, keys].chunk(2, dim=-1)
                part, part_lse = ops.dual_chunk_attention(
                    q_BsND[:, rows], k, v, logit_scale=_of_rows(logit_scale, rows), **starts, **attention.options()
                )
                output[:, rows], lse[..., rows] = ops.merge_attention(
                    [output[:, rows], part.to(wide)], [lse[..., rows], part_lse]
                )
            held = held if coming is None else coming.arrived()
        rounded = output.to(q_BsND.dtype)
        ctx.save_for_backward(q_BsND, mine_BsGD, rounded, lse, logit_scale)
        ctx.attention, ctx.group = attention, group
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q_BsND, held, output, lse, logit_scale = ctx.saved_tensors
        group, options = ctx.group, ctx.attention.options()
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        dq = torch.zeros_like(output, dtype=lse.dtype)
        coming_dkv: _Hop | None = None
        for hop in range(group.size()):
            coming = _Hop(held, group) if hop + 1 < group.size() else None
            dkv = torch.zeros_like(held, dtype=lse.dtype)
            for rows, keys, starts in _pairs(group, hop, q_BsND.shape[1] // 2):
                k, v = held[:, keys].chunk(2, dim=-1)
                parts = ops.dual_chunk_attention_backward(
                    grad[:, rows], q_BsND[:, rows], k, v, output[:, rows], lse[..., rows],
                    logit_scale=_of_rows(logit_scale, rows), **starts, **options,
                )  # fmt: skip
                dq[:, rows] += parts[0]
                dkv[:, keys] += torch.cat(parts[1:], dim=-1)
            if coming_dkv is not None:
                dkv += coming_dkv.arrived()
            coming_dkv = _Hop(dkv, group)  # behind the last hop they come home
            held = held if coming is None else coming.arrived()
        assert coming_dkv is not None, "a group has a rank"
        return dq.to(q_BsND.dtype), coming_dkv.arrived().to(held.dtype), None, None, None


def _pairs(group: dist.ProcessGroup, hop: int, piece: int) -> Iterator[tuple[Rows, Rows, dict[str, Any]]]:
    """Yield the pieces of this rank's queries and of the keys at hand that meet: their rows and first positions."""
    size = group.size()
    of_keys = pieces_of_rank((group.rank() - hop) % size, size)
    for i, query_piece in enumerate(pieces_of_rank(group.rank(), size)):
        for j, key_piece in enumerate(of_keys):
            if key_piece <= query_piece:
                starts = {"query_start": query_piece * piece, "key_start": key_piece * piece}
                yield slice(i * piece, (i + 1) * piece), slice(j * piece, (j + 1) * piece), starts


def _of_rows(logit_scale: torch.Tensor | None, rows: Rows) -> torch.Tensor | None:
    return None if logit_scale is None else logit_scale[rows]


class _Hop:
    """A tensor on its way to the next rank, and one of the same shape from the previous rank on its way here."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        self._sent = tensor  # must live until it has arrived
        self._received = torch.empty_like(tensor)
        peers = [dist.get_global_rank(group, (rank + step) % size) for step in (1, -1)]
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, peers[0], group),
                dist.P2POp(dist.irecv, self._received, peers[1], group),
            ]
        )

    def arrived(self) -> torch.Tensor:
        """Wait for both, and return what was received."""
        for work in self._works:
            work.wait()
        return self._received
