"""Attention of one sequence shared out over context-parallel ranks of a CPU: time and memory of a rank.

    python -m megatron_qwen.benchmark.context_cpu --length 8192 --ranks 1 2 4 --chunk-size 2048 --local-size 256

Forward and backward, over gloo. Counted is the CPU time of the busiest rank, waiting left out, so ranks may outnumber
cores; the time of a sequence on a machine with a core per rank is that and what its network adds. Memory is what torch
allocates at most during one call on a rank: results, gradients and keys of others included, inputs not.

Shapes: s tokens of this rank, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_qwen import ops
from megatron_qwen.benchmark.attention_cpu import DTYPES, peak_bytes
from megatron_qwen.benchmark.timing import summarise
from megatron_qwen.model.gathered_attention import CausalAttention, attend_gathered
from megatron_qwen.model.ring_attention import attend_ring
from megatron_qwen.parallel.layout import CP_COMM_TYPES
from megatron_qwen.testing.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is attended; batch 1."""

    length: int
    heads: int
    groups: int
    head_dim: int
    chunks: ops.ChunkLayout | None
    dtype: torch.dtype

    def attention(self) -> CausalAttention:
        """Plain, or with RoPE of base 1e6 as Qwen2.5's; keys come rotated."""
        if self.chunks is None:
            return CausalAttention()
        inv_freq = 1e6 ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        return CausalAttention(chunks=self.chunks, tables=ops.rope_tables(inv_freq, self.chunks.inter_position + 1))


def measure(jobs: Sequence[tuple[Sizes, str]], rounds: int) -> list[tuple[list[float], int]]:
    """Return CPU seconds of each round and bytes at most, of this rank, for each sequence and kind of communication."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    results = []
    for each, kind in jobs:
        rows, generator = each.length // group.size(), torch.Generator().manual_seed(group.rank())
        heads = each.heads, each.groups, each.groups
        tensors = [
            torch.randn(rows, 1, n, each.head_dim, generator=generator).to(each.dtype).requires_grad_() for n in heads
        ]
        attend, attention = attend_ring if kind == CP_COMM_TYPES[0] else attend_gathered, each.attention()

        def step(*tensors: torch.Tensor, attend=attend, attention=attention) -> None:  # type: ignore[no-untyped-def]
            output = attend(*tensors, attention, group)
            torch.autograd.grad(output, tensors, torch.ones_like(output))

        times = []
        for turn in range(rounds + 1):
            start = time.process_time()
            step(*tensors)
            if turn:
                times.append(time.process_time() - start)
        results.append((times, peak_bytes(step, tensors)))
    return results


def table(jobs: Sequence[tuple[Sizes, str]], sizes: Sequence[int], rounds: int) -> str:
    """Measure all jobs on as many ranks as each of `sizes` says and return a table in Markdown."""
    columns = (
        "attention",
        "communication",
        "ranks",
        "CPU s of a rank (p10 .. p90)",
        "tokens per CPU s",
        "MiB of a rank",
    )
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    found = {size: run_ranks(measure, size, jobs, rounds, timeout=3600) for size in sizes}
    for index, (each, kind) in enumerate(jobs):
        for size in sizes:
            of_ranks = [rank[index] for rank in found[size]]
            seconds = summarise([max(turn) for turn in zip(*(times for times, _ in of_ranks), strict=True)])
            name = "plain" if each.chunks is None else f"DCA {each.chunks.chunk_size}/{each.chunks.local_size}"
            lines.append(
                f"| {name} | {kind} | {size} | {seconds.median:.2f} ({seconds.p10:.2f} .. {seconds.p90:.2f}) | "
                f"{each.length / seconds.median:,.0f} | {max(peak for _, peak in of_ranks) / 2**20:.1f} |"
            )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m megatron_qwen.benchmark.context_cpu", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--length", type=int, default=8192, help="tokens on all ranks together")
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--heads", type=int, default=4, help="query heads")
    options.add_argument("--groups", type=int, default=2, help="key heads")
    options.add_argument("--head-dim", type=int, default=64)
    options.add_argument("--chunk-size", type=int, default=2048)
    options.add_argument("--local-size", type=int, default=256)
    options.add_argument("--dtype", choices=DTYPES, default="fp32")
    options.add_argument("--rounds", type=int, default=3, help="measured calls of each, after one that is not")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    given = parser().parse_args(arguments)
    jobs = [
        (
            Sizes(
                length=given.length,
                heads=given.heads,
                groups=given.groups,
                head_dim=given.head_dim,
                chunks=chunks,
                dtype=DTYPES[given.dtype],
            ),
            kind,
        )
        for chunks in (None, ops.ChunkLayout.released(given.chunk_size, given.local_size))
        for kind in CP_COMM_TYPES
    ]
    sys.stdout.write(table(jobs, given.ranks, given.rounds) + "\n")


if __name__ == "__main__":
    main()
