"""Calls as CUDA graphs: what an engine that decodes replays, with no launch by the host in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_qwen.benchmark.ops.case import Workload, copies
from megatron_qwen.benchmark.ops.contestants import OpContestant

_WARMUP = 3  # kernels are compiled and workspaces made before anything is recorded


def graphed(workload: Workload, contestant: OpContestant) -> OpContestant:
    """Return a contestant that replays a graph of one call, or one without a function that says why there is none.

    Args:
        workload: the call's arguments; the graph has a copy of the leaves.
        contestant: with a function. It reads nothing on the host, or the recording ends there.
    """
    function = contestant.function
    assert function is not None
    arguments = {**workload.arguments(), **copies(workload.leaves)}
    try:
        with contestant.scope(), torch.no_grad():
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUP):
                    function(**arguments)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = function(**arguments)
    except RuntimeError as error:  # CUDA's and torch's: a read on the host, a call that cannot be recorded
        reason = str(error).strip().split("\n")[0]
        return replace(contestant, function=None, missing=f"right, but not timed: no CUDA graph of it: {reason}")

    def replay(**_: Any) -> torch.Tensor:
        assert arguments  # the graph reads them where they are: they live as long as this function
        graph.replay()
        return output  # type: ignore[no-any-return]

    return replace(contestant, function=replay)
