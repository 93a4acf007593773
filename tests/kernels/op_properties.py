"""Checks of the properties that op_table.py's operations share and that another process runs, too."""

from __future__ import annotations

import torch
from op_checks import random, results, rows_beyond_32_bits
from op_table import CASES

from megatron_qwen import ops


def check_far_rows(name: str, backend: str) -> None:
    """The first argument's last row lies 2^31 elements behind its first; results and gradients stay the same."""
    case = CASES[name]
    arguments = (backend != "reference" and case.kernel_arguments) or case.arguments
    rows = most = 2**31 // case.row_distance + 1
    while arguments(rows, torch.bfloat16)[case.leaves[0]].shape[0] > most:
        rows -= 1
    near = arguments(rows, torch.bfloat16)
    first = near[case.leaves[0]]
    far = rows_beyond_32_bits(first.shape[1], distance=case.row_distance)[: first.shape[0]]
    far.copy_(first)
    with ops.use_backend(backend):
        grads = [random(tuple(each.shape), each.dtype, seed=10) for each in case.run(near)]
        found = [
            results(case.of_leaves(near), [leaf, *case.tensors(near)[1:]], grads) for leaf in (first.contiguous(), far)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
