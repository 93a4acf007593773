"""Causal attention with keys and values that go around a ring of context-parallel ranks.

In hop t rank r holds those of rank r - t, and sends them on while it computes. Outputs over parts of the keys are
merged exactly by their log-sum-exps, in fp32; backward goes around once more with the merged ones, and the gradients
of keys and values travel with them, in fp32, until they are home (arXiv 2310.01889). Pieces of keys behind a piece of
queries are not computed: by the zig-zag order of `parallel/context.py`, 3 pairs of pieces are left in the first hop and
2 in each other one, on every rank.

Packed sequences go around together. The operation takes queries and keys at any two positions only as [B, s, ...], so
sequences are computed one by one, and neighbours of one length as a batch, without a copy. The host knows the lengths:
no hop waits for a device.

Shapes: s tokens of a sequence on this rank, B sequences, T tokens of packed sequences on all ranks, N query heads,
G key-value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.gathered_attention import CausalAttention
from megatron_qwen.parallel.context import pieces_of_rank

Rows = slice
Batches = tuple[tuple[int, int], ...]
"""Of packed sequences: how many neighbours have how many tokens each on this rank."""


def attend_ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: CausalAttention,
    group: dist.ProcessGroup,
    *,
    lengths: Sequence[int] | None = None,
    logit_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the keys of all ranks of `group`, which pass by. Collective.

    Args:
        q: this rank's rows [s, B, N, D]; [T / cp, N, D] packed.
        k: this rank's keys [s, B, G, D] or [T / cp, G, D], rotated.
        v: as k.
        attention: what to compute.
        group: context-parallel ranks.
        lengths: of packed sequences, whole ones, as `parallel.context.packed_lengths` returns them; else None.
        logit_scale: of this rank's rows, [s] or [T / cp].

    Returns:
        As q.

    Raises:
        ConfigError: the rows are not those of sequences of these lengths.
    """
    if lengths is None:
        batches = None
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        logit_scale = None if logit_scale is None else logit_scale.unsqueeze(0)
    else:
        # The operation has one logit_scale for all sequences of a batch.
        batches = _batches(lengths, q.shape[0], group.size(), has_neighbours=logit_scale is None)
    keys_values = torch.cat((k, v), dim=-1)
    output: torch.Tensor = _Ring.apply(q, keys_values, logit_scale, attention, group, batches)  # type: ignore[no-untyped-call]
    return output.transpose(0, 1) if lengths is None else output


class _Ring(torch.autograd.Function):
    """On [B, s, heads, D] or packed [T / cp, heads, D], with logit_scale [1, s] or [T / cp]; keys beside values."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        mine: torch.Tensor,
        logit_scale: torch.Tensor | None,
        attention: CausalAttention,
        group: dist.ProcessGroup,
        batches: Batches | None,
    ) -> torch.Tensor:
        mine = mine.contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        output, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:-1], dtype=wide)
        held = mine
        for hop in range(group.size()):
            coming = _Hop(held, group) if hop + 1 < group.size() else None
            for tensors in _cut(batches, q, held, logit_scale, output, lse):
                _attend(*tensors, hop=hop, group=group, options=attention.options())
            held = held if coming is None else coming.arrived()
        rounded = output.to(q.dtype)
        ctx.save_for_backward(q, mine, logit_scale, rounded, lse)
        ctx.attention, ctx.group, ctx.batches = attention, group, batches
        return rounded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, held, logit_scale, output, lse = ctx.saved_tensors
        group, options = ctx.group, ctx.attention.options()
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        dq = torch.zeros_like(output, dtype=lse.dtype)
        coming_dkv: _Hop | None = None
        for hop in range(group.size()):
            coming = _Hop(held, group) if hop + 1 < group.size() else None
            dkv = torch.zeros_like(held, dtype=lse.dtype)
            for tensors in _cut(ctx.batches, q, held, logit_scale, output, lse, grad, dq, dkv):
                _attend_backward(*tensors, hop=hop, group=group, options=options)
            if coming_dkv is not None:
                dkv += coming_dkv.arrived()
            coming_dkv = _Hop(dkv, group)  # behind the last hop they come home
            held = held if coming is None else coming.arrived()
        assert coming_dkv is not None, "a group has a rank"
        return dq.to(q.dtype), coming_dkv.arrived().to(held.dtype), None, None, None, None


def _batches(lengths: Sequence[int], rows: int, size: int, *, has_neighbours: bool) -> Batches:
    """Return how many neighbours of a length there are, one after another, or each sequence for itself."""
    if sum(lengths) != rows * size:
        raise ConfigError(
            f"context parallelism: {rows} tokens on this rank of {size}, packed sequences of {sum(lengths)}; "
            f"expected {sum(lengths) // size} tokens"
        )
    if not has_neighbours:
        return tuple((1, length // size) for length in lengths)
    return tuple((len(list(alike)), length // size) for length, alike in itertools.groupby(lengths))


def _cut(batches: Batches | None, *tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield views [B, s, ...] of the sequences of each batch."""
    if batches is None:
        yield tensors
        return
    first = 0
    for count, tokens in batches:
        rows = slice(first, first + count * tokens)
        yield tuple(None if each is None else torch.unflatten(each[rows], 0, (count, tokens)) for each in tensors)
        first = rows.stop


def _attend(
    q_BsND: torch.Tensor,
    kv_BsGD: torch.Tensor,
    scale_Bs: torch.Tensor | None,
    output_BsND: torch.Tensor,
    lse_BsN: torch.Tensor,
    *,
    hop: int,
    group: dist.ProcessGroup,
    options: dict[str, Any],
) -> None:
    """Merge attention to the keys at hand into output and lse; the first ones a row meets are in hop 0."""
    for rows, keys, starts in _pairs(group, hop, q_BsND.shape[1] // 2):
        k, v = kv_BsGD[:, keys].chunk(2, dim=-1)
        part, part_lse = ops.dual_chunk_attention(
            q_BsND[:, rows], k, v, logit_scale=_of_rows(scale_Bs, rows), **starts, **options
        )
        part = part.to(lse_BsN.dtype)
        if hop or keys.start:
            before = output_BsND[:, rows], lse_BsN[:, rows].transpose(1, 2)
            part, part_lse = ops.merge_attention([before[0], part], [before[1], part_lse])
        output_BsND[:, rows], lse_BsN[:, rows] = part, part_lse.transpose(1, 2)


def _attend_backward(
    q_BsND: torch.Tensor,
    kv_BsGD: torch.Tensor,
    scale_Bs: torch.Tensor | None,
    output_BsND: torch.Tensor,
    lse_BsN: torch.Tensor,
    grad_BsND: torch.Tensor,
    dq_BsND: torch.Tensor,
    dkv_BsGD: torch.Tensor,
    *,
    hop: int,
    group: dist.ProcessGroup,
    options: dict[str, Any],
) -> None:
    """Add what the keys at hand contribute to dq, and the gradients of those keys and their values to dkv."""
    for rows, keys, starts in _pairs(group, hop, q_BsND.shape[1] // 2):
        k, v = kv_BsGD[:, keys].chunk(2, dim=-1)
        lse = lse_BsN[:, rows].transpose(1, 2).contiguous()
        dq, *dkv = ops.dual_chunk_attention_backward(
            grad_BsND[:, rows], q_BsND[:, rows], k, v, output_BsND[:, rows], lse,
            logit_scale=_of_rows(scale_Bs, rows), **starts, **options,
        )  # fmt: skip
        dq_BsND[:, rows] += dq
        dkv_BsGD[:, keys] += torch.cat(dkv, dim=-1)


def _pairs(group: dist.ProcessGroup, hop: int, piece: int) -> Iterator[tuple[Rows, Rows, dict[str, Any]]]:
    """Yield the pieces of this rank's queries and of the keys at hand that meet: their rows and first positions."""
    size = group.size()
    of_keys = pieces_of_rank((group.rank() - hop) % size, size)
    for i, query_piece in enumerate(pieces_of_rank(group.rank(), size)):
        for j, key_piece in enumerate(of_keys):
            if piece and key_piece <= query_piece:
                starts = {"query_start": query_piece * piece, "key_start": key_piece * piece}
                yield slice(i * piece, (i + 1) * piece), slice(j * piece, (j + 1) * piece), starts


def _of_rows(scale_Bs: torch.Tensor | None, rows: Rows) -> torch.Tensor | None:
    return None if scale_Bs is None else scale_Bs[0, rows]


class _Hop:
    """A tensor on its way to the next rank, and one of the same shape from the previous rank on its way here."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        self._sent = tensor  # must live, unchanged, until it has arrived
        if size == 1:
            self._received, self._works = tensor, []  # gloo does not send to itself
            return
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
