"""Dual Chunk Attention of a CPU beside torch's causal attention: time and memory by length.

    python -m megatron_qwen.benchmark.attention_cpu --length 16384 --chunk-size 4096 --local-size 512

Both compute as many logits; ours also rotates queries (up to three times) and keys, and merges the pieces. Forwards are
run in turn (A B A B ...) and counted in CPU time, which other work on the machine disturbs least. Memory is what torch
allocates at most during one call, results included, inputs not.

Shapes: S tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.benchmark.timing import summarise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One comparison; batch 1."""

    length: int
    heads: int
    groups: int
    head_dim: int
    chunks: ops.ChunkLayout
    dtype: torch.dtype

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Random q [1, S, H, D], k and v [1, S, G, D]."""
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(1, self.length, heads, self.head_dim, generator=generator).to(self.dtype)
            for heads in (self.heads, self.groups, self.groups)
        )

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of RoPE with base 1e6, as Qwen2.5's."""
        inv_freq = 1e6 ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        return ops.rope_tables(inv_freq, self.chunks.inter_position + 1)


def contestants(sizes: Sizes) -> dict[str, Callable[..., torch.Tensor]]:
    """Ours and torch's, as functions of q, k and v."""
    tables = sizes.tables()

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.dual_chunk_attention(q, k, v, chunks=sizes.chunks, tables=tables)[0]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return {"dual chunk": ours, "sdpa causal": plain}


def with_backward(function: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """Forward and backward of it."""

    def step(*tensors: torch.Tensor) -> None:
        output = function(*(each.detach().requires_grad_() for each in tensors))
        output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]

    return step


def seconds(runs: Sequence[Callable[..., object]], tensors: Sequence[torch.Tensor], rounds: int) -> list[list[float]]:
    """CPU time of each run in each round, after one that does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, mine in zip(runs, times, strict=True):
            start = time.process_time()
            run(*tensors)
            if turn:
                mine.append(time.process_time() - start)
    return times


def peak_bytes(run: Callable[..., object], tensors: Sequence[torch.Tensor]) -> int:
    """Largest sum of what torch's CPU allocator gave out during one call and had not got back."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(*tensors)
    total, peak = 0, 0
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    for event in results.events() if results is not None else []:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def report(sizes: Sizes, rounds: int, include_backward: bool) -> str:
    """Measure one comparison and return its lines of a table."""
    tensors, functions = sizes.tensors(), contestants(sizes)
    passes: dict[str, dict[str, Callable[..., object]]] = {"forward": {**functions}}
    if include_backward:
        passes["forward + backward"] = {name: with_backward(each) for name, each in functions.items()}
    lines = []
    for label, runs in passes.items():
        ours, plain = (summarise(each) for each in seconds(list(runs.values()), tensors, rounds))
        memory = [peak_bytes(each, tensors) / 2**20 for each in runs.values()]
        lines.append(
            f"| {str(sizes.dtype).removeprefix('torch.')} | {sizes.length} | {label} | {ours.median:.3f} "
            f"({ours.p10:.3f} .. {ours.p90:.3f}) | {plain.median:.3f} ({plain.p10:.3f} .. {plain.p90:.3f}) | "
            f"{ours.median / plain.median:.2f} | {memory[0]:.1f} | {memory[1]:.1f} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m megatron_qwen.benchmark.attention_cpu", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--length", type=int, nargs="+", default=[4096, 16384], help="tokens")
    options.add_argument("--heads", type=int, default=4, help="query heads")
    options.add_argument("--groups", type=int, default=2, help="key heads")
    options.add_argument("--head-dim", type=int, default=64)
    options.add_argument("--chunk-size", type=int, default=4096)
    options.add_argument("--local-size", type=int, default=512)
    options.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    options.add_argument("--rounds", type=int, default=5, help="measured calls of each, after one that is not")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--backward", action="store_true", help="forward and backward, too")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    given = parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    columns = ("dtype", "tokens", "pass", "ours, CPU s (p10 .. p90)", "sdpa causal", "ratio", "ours, MiB", "sdpa, MiB")
    sys.stdout.write("\n".join(("| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|", "")))
    for dtype in given.dtype:
        for length in given.length:
            sizes = Sizes(
                length=length,
                heads=given.heads,
                groups=given.groups,
                head_dim=given.head_dim,
                chunks=ops.ChunkLayout.released(given.chunk_size, given.local_size),
                dtype=DTYPES[dtype],
            )
            sys.stdout.write(report(sizes, given.rounds, given.backward) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
