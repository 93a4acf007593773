"""Our kernels at sizes that fit no block, in every dtype: `bench ops --check`, and what the sanitizer watches.

Run as a module it is the program under compute-sanitizer: `python -m ...odd_sizes cuda triton,cuda rms_norm`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from megatron_qwen.benchmark.ops.case import OpCase, Sizes
from megatron_qwen.benchmark.ops.check import check_contestants
from megatron_qwen.benchmark.ops.contestants import take_part
from megatron_qwen.benchmark.ops.registry import choose_cases
from megatron_qwen.benchmark.ops.result import OddCheck

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_odd_sizes(
    cases: Sequence[OpCase], device: torch.device, backends: Sequence[str], on_done: Callable[[str], None] | None = None
) -> Iterator[OddCheck]:
    """Yield a verdict per case, odd size, dtype and backend that can run.

    Args:
        cases: of the registry.
        device: where.
        backends: of `contestants.OURS`.
        on_done: called with the case's name after each size and dtype.
    """
    for case in cases:
        for sizes, name in odd_shapes(case):
            dtype = DTYPES[name]
            contestants = take_part(case, device, dtype, backends, ())
            workload = case.workload(sizes, dtype, device, 0)
            for backend, verdict in check_contestants(case, workload, contestants).items():
                yield OddCheck(
                    case=case.name,
                    sizes=dict(sizes),
                    dtype=name,
                    contestant=backend,
                    is_right=verdict.is_right,
                    detail=verdict.detail,
                )
            if on_done is not None:
                on_done(case.name)


def odd_shapes(case: OpCase) -> list[tuple[Sizes, str]]:
    """Return (sizes, dtype): bf16 at every size, fp32 at two, fp16 at one.

    On a GPU most of the time goes into compiling a kernel for each.
    """
    return [
        (sizes, dtype)
        for index, sizes in enumerate(case.odd_sizes)
        for dtype, is_asked in (("bf16", True), ("fp32", index < 2), ("fp16", index == 1))
        if is_asked
    ]


def main(device: str, backends: Sequence[str], names: Sequence[str]) -> int:
    """Check the named cases, print a JSON line per wrong result, and return how many there are."""
    wrong = [
        each for each in check_odd_sizes(choose_cases((), tuple(names)), torch.device(device), backends)
        if not each.is_right
    ]  # fmt: skip
    for each in wrong:
        sys.stdout.write(json.dumps(asdict(each)) + "\n")
    return len(wrong)


if __name__ == "__main__":
    raise SystemExit(1 if main(sys.argv[1], sys.argv[2].split(","), sys.argv[3:]) else 0)
