"""Causal attention across context-parallel ranks that gather all keys and values; see `parallel/context.py`.

Each rank attends once per piece of its queries, to the keys up to the end of the piece. Backward is a reduce-scatter.

Shapes: S tokens of a sequence, s = S / cp of them on this rank, T tokens of packed sequences, B sequences, N query
heads and G key-value heads of this rank, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_qwen import ops
from megatron_qwen.parallel.context import packed_lengths, pieces_of_rank


@dataclass(frozen=True, kw_only=True)
class CausalAttention:
    """What all parts of one attention have in common; as in `ops.dual_chunk_attention`.

    Attributes:
        chunks: None for plain causal attention.
        tables: of the queries; None if they come rotated. Keys come rotated in any case.
        softmax_scale: of the logits; None for D^-0.5.
    """

    chunks: ops.ChunkLayout | None = None
    tables: tuple[torch.Tensor, torch.Tensor] | None = None
    softmax_scale: float | None = None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the operation."""
        return {
            "chunks": self.chunks,
            "tables": self.tables,
            "keys_rotated": self.tables is not None,
            "softmax_scale": self.softmax_scale,
        }


def attend_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: CausalAttention,
    group: dist.ProcessGroup,
    *,
    logit_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the keys of all ranks of `group`, gathered. Collective.

    Args:
        q: this rank's rows [s, B, N, D].
        k: this rank's keys [s, B, G, D], rotated.
        v: as k.
        attention: what to compute.
        group: context-parallel ranks.
        logit_scale: of this rank's rows, [s].

    Returns:
        [s, B, N, D].
    """
    tokens, rank, size = q.shape[0] * group.size(), group.rank(), group.size()
    k, v = _gather(k, v, _order(tokens, size, q.device), group)
    piece = q.shape[0] // 2
    outputs = []
    for index, number in enumerate(pieces_of_rank(rank, size)):
        rows, end = slice(index * piece, (index + 1) * piece), (number + 1) * piece
        # Keys behind the piece are left out; then the last query meets the last key, the operation's default.
        output, _ = ops.dual_chunk_attention(
            *(each.transpose(0, 1) for each in (q[rows], k[:end], v[:end])),
            logit_scale=None if logit_scale is None else logit_scale[rows],
            **attention.options(),
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


class PackedPlan(NamedTuple):
    """Where the tokens of packed sequences are, for one rank.

    Attributes:
        order: for each token of all ranks together, in the order of the sequences, its row behind a gather.
        rows: for both pieces, this rank's rows of them in all sequences.
        bounds: for both pieces, boundaries of the sequences among these rows.
        keys: for both pieces, the tokens up to their ends, in the order of the sequences.
        key_bounds: for both pieces, boundaries of the sequences among these keys.
        back: for each of this rank's rows, its place behind the first pieces followed by the second ones.
    """

    order: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor]
    bounds: tuple[torch.Tensor, torch.Tensor]
    keys: tuple[torch.Tensor, torch.Tensor]
    key_bounds: tuple[torch.Tensor, torch.Tensor]
    back: torch.Tensor


def plan_packed(cu_seqlens: torch.Tensor, *, rank: int, size: int) -> PackedPlan:
    """Return the plan of packed sequences. Reads cu_seqlens on the host: call it once per batch.

    Args:
        cu_seqlens: boundaries of the sequences on all ranks together, integers [sequences + 1], from 0 to T.
        rank: this context-parallel rank.
        size: number of them.

    Raises:
        ConfigError: see `packed_lengths`.
    """
    device, bounds = cu_seqlens.device, cu_seqlens.cpu()
    lengths = torch.tensor(packed_lengths(bounds.tolist(), size=size), dtype=torch.int64)
    starts = bounds[:-1].long()
    token_starts = starts.repeat_interleave(lengths // size)
    held = [ops.packed_positions(bounds, cp_size=size, cp_rank=each) + token_starts for each in range(size)]
    order = torch.cat(held).argsort()
    pieces, numbers = lengths // (2 * size), pieces_of_rank(rank, size)
    rows = [_ranges(starts // size + half * pieces, pieces) for half in range(2)]
    keys = [_ranges(starts, (number + 1) * pieces) for number in numbers]
    scaled = cu_seqlens // (2 * size)
    return PackedPlan(
        order=order.to(device),
        rows=_pair(each.to(device) for each in rows),
        bounds=(scaled, scaled),
        keys=_pair(each.to(device) for each in keys),
        key_bounds=_pair(scaled * (number + 1) for number in numbers),
        back=torch.cat(rows).argsort().to(device),
    )


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: PackedPlan,
    attention: CausalAttention,
    group: dist.ProcessGroup,
    *,
    logit_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend within packed sequences to the keys of all ranks of `group`, gathered. Collective.

    Args:
        q: this rank's rows [T / cp, N, D].
        k: this rank's keys [T / cp, G, D], rotated.
        v: as k.
        plan: of these sequences on this rank.
        attention: what to compute.
        group: context-parallel ranks.
        logit_scale: of this rank's rows, [T / cp].

    Returns:
        [T / cp, N, D].
    """
    k, v = _gather(k, v, plan.order, group)
    outputs = []
    for rows, bounds, keys, key_bounds in zip(plan.rows, plan.bounds, plan.keys, plan.key_bounds, strict=True):
        output, _ = ops.dual_chunk_attention(
            q.index_select(0, rows),
            k.index_select(0, keys),
            v.index_select(0, keys),
            cu_seqlens_q=bounds,
            cu_seqlens_k=key_bounds,
            logit_scale=None if logit_scale is None else logit_scale.index_select(0, rows),
            **attention.options(),
        )
        outputs.append(output)
    return torch.cat(outputs).index_select(0, plan.back)


def _gather(
    k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of all ranks, in the order of the sequences; one collective for both."""
    gathered: torch.Tensor = _Gather.apply(torch.cat((k, v), dim=-1), order, group)  # type: ignore[no-untyped-call]
    return gathered[..., : k.shape[-1]], gathered[..., k.shape[-1] :]


class _Gather(torch.autograd.Function):
    """All-gather along the first axis, then rows in `order`; backward sums what all ranks say about a row."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, order: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        ctx.save_for_backward(order)
        gathered = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, mine.contiguous(), group=group)
        return gathered.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (order,), (grad,) = ctx.saved_tensors, grads
        by_rank = torch.empty_like(grad, memory_format=torch.contiguous_format)
        by_rank[order] = grad
        mine = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, by_rank, group=ctx.group)
        return mine, None, None


@functools.lru_cache(maxsize=8)
def _order(tokens: int, size: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # so that what a forward pass alone made serves a training step, too
        held = [ops.context_parallel_positions(tokens, cp_size=size, cp_rank=rank) for rank in range(size)]
        return torch.cat(held).argsort().to(device)


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return starts[i], ..., starts[i] + lengths[i] - 1 for each i, one after another; int64."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _pair(items: Any) -> tuple[Any, Any]:
    first, second = items
    return first, second
