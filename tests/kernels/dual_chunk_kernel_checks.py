"""Checks of Dual Chunk Attention for kernels, at sizes of heads that they take; see dual_chunk_checks.py."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any
from unittest import mock

import torch
from dual_chunk_checks import ABSENT, Example
from op_checks import random
from test_dual_chunk_decode import paged, rotated_keys

from megatron_qwen import ops
from megatron_qwen.kernels.dual_chunk_attention.arguments import checked_request
from megatron_qwen.testing.compare import assert_close_to_fp64, assert_relative
from megatron_qwen.testing.poison import poisoned_outputs

SIZE = 64


def check_decoding(
    chunks: ops.ChunkLayout | None, lengths: tuple[int, ...], dtype: torch.dtype, backend: str, heads: int = 3
) -> None:
    """Against fp64 by the rule, with NaN in every slot of the pages that no token has; 0 for a length of 0."""
    example = Example(lengths=(max(lengths),), batch=len(lengths), heads=(heads, 1), size=SIZE, chunks=chunks)
    (q, k, v, _), options = example.inputs(dtype), example.options(dtype)
    pages = paged(rotated_keys(k, options), v, lengths, seed=1)
    scale = torch.linspace(1.0, 1.5, len(lengths))

    def decode(wide: torch.dtype, backend: str) -> torch.Tensor:
        more = torch.promote_types(wide, torch.float32)
        with ops.use_backend(backend):
            return ops.paged_decode_attention(
                *(each.to(wide) for each in (q[:, 3], *pages[:2])),
                pages[2],
                torch.tensor(lengths),
                chunks=chunks,
                tables=tuple(each.to(more) for each in options["tables"]),
                logit_scale=scale.to(more),
            )

    plain, exact = decode(dtype, "reference"), decode(torch.float64, "reference")
    with poisoned_outputs() as memory:
        ours = decode(dtype, backend)
    assert memory.count
    assert_close_to_fp64(ours, plain, exact)
    assert all((each == 0).all() for each, length in zip(ours, lengths, strict=True) if not length)


def check_parts_of_the_keys(chunks: ops.ChunkLayout, backend: str) -> None:
    """Keys in two parts, each with its own first position, merged; rows that see none of a part; views."""
    rows, columns, start, cut = 21, 37, 30, 33
    wide = [random((1, each, 4, SIZE), torch.float32, seed=seed) for seed, each in enumerate((rows, columns, columns))]
    q, k, v = wide[0][:, :, 1:3], wide[1][:, :, 2:3], wide[2][:, :, :1]
    grad = random((1, rows, 2, SIZE), torch.float32, seed=3)
    example = Example(lengths=(columns,), size=SIZE, chunks=chunks)
    common = {"chunks": chunks, "tables": example.options(torch.float32)["tables"], "query_start": start}
    found = []
    for name, cuts in (("reference", (0, columns)), (backend, (0, cut, columns))):
        parts = [slice(first, last) for first, last in itertools.pairwise(cuts)]
        with ops.use_backend(name), poisoned_outputs():
            results = [
                ops.dual_chunk_attention(q, k[:, part], v[:, part], key_start=part.start, **common) for part in parts
            ]
            output, lse = ops.merge_attention(*zip(*results, strict=True))
            lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # of any strides, too
            grads = [
                ops.dual_chunk_attention_backward(
                    grad, q, k[:, part], v[:, part], output, lse, key_start=part.start, **common
                )
                for part in parts
            ]
        dq, dk, dv = zip(*grads, strict=True)
        found.append((output, lse, sum(dq), torch.cat(dk, 1), torch.cat(dv, 1)))
    for name, expected, ours in zip(("output", "lse", "dq", "dk", "dv"), *found, strict=True):
        assert_relative(ours, expected, 4e-6, name=name)


class NotLaunched:
    """Stands for a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def bytes_of_backward(heads: tuple[int, int], rows: int) -> float:
    """The most that is allocated at once beside the results, for each number of q, by torch's own account."""
    from megatron_qwen.kernels.dual_chunk_attention import kernel_backward, rotate_kernel

    example = Example(lengths=(rows,), batch=1, heads=heads, size=SIZE, chunks=ops.ChunkLayout.released(512, 64))
    q, k, v, grad = example.inputs(torch.bfloat16)
    request = checked_request(q, k, v, **{**ABSENT, **example.options(torch.bfloat16)})
    lse = q.new_empty((1, heads[0], rows), dtype=torch.float32)
    with contextlib.ExitStack() as stack:
        for module in (kernel_backward, rotate_kernel):
            kernels = {name: NotLaunched() for name in vars(module) if name.endswith("_kernel")}
            stack.enter_context(mock.patch.multiple(module, **kernels))
        profile = stack.enter_context(
            torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
        )
        results = kernel_backward.launch_backward(grad, q, k, v, grad, lse, request)
    most = total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return (most - sum(each.nbytes for each in results)) / q.numel()
