"""What the ranks of test_context_parallel.py run, many cases in one process group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from model_ranks import part_of, whole

from megatron_qwen.model import ring_attention
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import leave_layout

BATCH, LENGTH = 2, 48
# Of packed sequences: multiples of 2 cp = 8, neighbours of one length, empty ones in between and at the end.
BOUNDS = (0, 8, 32, 56, 56, 96, 96)
HEADS, GROUPS, HEAD = 4, 2, 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one layout; `fields` are of Megatron's configuration."""

    name: str
    config: QwenConfig
    layout: ParallelLayout
    is_packed: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def gradients(case: Case, weights: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """Return loss, the full gradient of every parameter, and the positions by which tokens were rotated."""
    from megatron_qwen.model.build import build_model

    model = build_model(case.config, layout=case.layout, dtype=torch.float32, backend="local", **case.fields)
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(p.shape, generator=generator) * 0.2 for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(part_of(name, parameter, weights[name], case.config))
    positions = watch_positions(case.config)
    tokens, labels, options = batch(case)
    losses = model(tokens, torch.zeros_like(tokens), None, labels=labels, **options)
    loss = losses.sum() / (BOUNDS[-1] if case.is_packed else BATCH * LENGTH)
    loss.backward()
    grads = {name: over_context(whole(name, parameter)) for name, parameter in model.named_parameters()}
    return {"loss": over_context(loss.detach()), "grads": grads, "weights": weights, "positions": positions[0]}


def batch(case: Case) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_qwen.parallel.context import tokens_of_rank

    where = {"rank": parallel_state.get_context_parallel_rank(), "size": case.layout.cp}
    rows, length = (1, BOUNDS[-1]) if case.is_packed else (BATCH, LENGTH)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, case.config.vocab_size, (rows, length), generator=generator)
    labels = tokens.roll(-1, 1)
    if not case.is_packed:
        return tokens_of_rank(tokens, dim=1, **where), tokens_of_rank(labels, dim=1, **where), {}
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    longest = int(bounds.diff().max())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    ours = [
        torch.cat([tokens_of_rank(part, dim=1, **where) for part in each.split(bounds.diff().tolist(), dim=1)], dim=1)
        for each in (tokens, labels)
    ]
    return ours[0], ours[1], {"packed_seq_params": packed}


def over_context(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over context-parallel ranks, each of which has seen its tokens only."""
    from megatron.core import parallel_state

    if parallel_state.get_context_parallel_world_size() > 1:
        torch.distributed.all_reduce(tensor, group=parallel_state.get_context_parallel_group())
    return tensor


def watch_positions(config: QwenConfig) -> list[list[int]]:
    """Return a list into which the first layer puts the positions of its tokens, as numbers."""
    from megatron_qwen import ops
    from megatron_qwen.model import self_attention
    from megatron_qwen.model.rope import inverse_frequencies

    slowest = float(inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)[-1])
    seen: list[list[int]] = []

    class Watched:
        """`ops`, with an eye on two of its functions."""

        def __getattr__(self, name: str) -> Any:
            function = getattr(ops, name)

            def call(*args: Any, **options: Any) -> Any:
                cos, sin = args[1:3] if name == "qkv_rope" else args[2:4]
                # The slowest angle tells the position, as it is far from a full turn.
                rows = (torch.atan2(sin[:, -1], cos[:, -1]) / slowest).round().long()
                positions = options["positions"]
                seen.append((rows[: len(args[0])] if positions is None else rows[positions.long()]).tolist())
                return function(*args, **options)

            return call if name in ("qkv_rope", "rope_") else function

    self_attention.ops = Watched()
    return seen


def gradients_of_all(cases: list[tuple[Case, dict[str, torch.Tensor]]]) -> list[dict[str, Any]]:
    """Run cases one after another, each in its own layout, over one process group; results without the weights."""
    from megatron_qwen.parallel import groups

    results = []
    for case, weights in cases:
        groups.initialize(case.layout)
        result = gradients(case, weights)
        results.append({name: result[name] for name in ("loss", "grads", "positions")})
        leave_layout()
    return results


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Queries, keys, values and the gradient of the output of whole sequences, and what to compute of them.

    [S, B, N, D], or [T, N, D] packed; `chunks`: chunk_size, local_size, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    chunks: tuple[int, int] | None
    tables: tuple[torch.Tensor, torch.Tensor] | None
    logit_scale: torch.Tensor | None


def heads(*, chunks: tuple[int, int] | None, is_packed: bool, dtype: torch.dtype) -> Heads:
    generator = torch.Generator().manual_seed(3)
    lead = (BOUNDS[-1],) if is_packed else (LENGTH, BATCH)
    q, k, v, grad = (
        torch.randn(*lead, n, HEAD, generator=generator, dtype=torch.float64).to(dtype)
        for n in (HEADS, GROUPS, GROUPS, HEADS)
    )
    tables, logit_scale = None, None
    if chunks is not None:
        angles = torch.outer(torch.arange(chunks[0] + 1, dtype=torch.float64), 0.3 ** torch.arange(HEAD // 2))
        wide = torch.promote_types(dtype, torch.float32)
        tables = angles.cos().to(wide), angles.sin().to(wide)
        logit_scale = torch.rand(lead[0], generator=generator, dtype=torch.float64).to(wide) + 0.5
    return Heads(q=q, k=k, v=v, grad=grad, chunks=chunks, tables=tables, logit_scale=logit_scale)


HOP = ring_attention._Hop
LATE = "p2p, late"


class LateHop:
    """A hop that takes place while it is waited for, as it may over NCCL: what is on its way must not change."""

    def __init__(self, tensor: torch.Tensor, group: Any) -> None:
        self._of = tensor, group

    def arrived(self) -> torch.Tensor:
        return HOP(*self._of).arrived()


def attention_of_rank(each: Heads, kind: str, group: Any) -> tuple[torch.Tensor, ...]:
    """Return this rank's part of output, dq, dk and dv."""
    from megatron_qwen import ops
    from megatron_qwen.model.gathered_attention import CausalAttention, attend_gathered, attend_packed, plan_packed
    from megatron_qwen.parallel.context import packed_lengths

    where = {"cp_rank": group.rank(), "cp_size": group.size()}
    is_packed = each.q.dim() == 3
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    rows = ops.context_parallel_positions(LENGTH, **where).long()
    if is_packed:
        lengths = bounds.diff() // group.size()
        rows = ops.packed_positions(bounds, **where).long() + bounds[:-1].repeat_interleave(lengths)
    qkv = [tensor[rows].clone().requires_grad_() for tensor in (each.q, each.k, each.v)]
    chunks = None if each.chunks is None else ops.ChunkLayout.released(*each.chunks)
    attention = CausalAttention(chunks=chunks, tables=each.tables)
    logit_scale = None if each.logit_scale is None else each.logit_scale[rows]
    if kind.startswith("p2p"):
        ring_attention._Hop = LateHop if kind == LATE else HOP
        packed = packed_lengths(BOUNDS, size=group.size()) if is_packed else None
        output = ring_attention.attend_ring(*qkv, attention, group, lengths=packed, logit_scale=logit_scale)
    elif is_packed:
        plan = plan_packed(bounds, rank=group.rank(), size=group.size())
        output = attend_packed(*qkv, plan, attention, group, logit_scale=logit_scale)
    else:
        output = attend_gathered(*qkv, attention, group, logit_scale=logit_scale)
    return rows, output.detach(), *torch.autograd.grad(output, qkv, each.grad[rows])


def attention_of_all(jobs: list[tuple[Heads, str]], sizes: tuple[int, ...]) -> list[list[tuple[torch.Tensor, ...]]]:
    """Run jobs over neighbouring ranks in groups of each size; returns results by size, then by job."""
    import torch.distributed as dist

    from megatron_qwen.parallel import groups

    groups.initialize(ParallelLayout())
    world, results = dist.get_world_size(), []
    for size in sizes:
        everyone = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        mine = everyone[dist.get_rank() // size]
        results.append([attention_of_rank(each, kind, mine) for each, kind in jobs])
    leave_layout()
    return results


def everything(
    jobs: list[tuple[Heads, str]], sizes: tuple[int, ...], cases: list[tuple[Case, dict[str, torch.Tensor]]]
) -> tuple[Any, Any]:
    return attention_of_all(jobs, sizes), gradients_of_all(cases)
