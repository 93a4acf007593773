"""As aot_launches.py, for the operations of a mixture of experts.

Usage: aot_moe_launches.py ARCHITECTURE [LABEL ...].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from aot_launches import meta

from megatron_qwen import ops
from megatron_qwen.kernels import backends
from megatron_qwen.kernels.grouped_mlp import launch as grouped_mlp
from megatron_qwen.kernels.grouped_mlp import op as mlp_op
from megatron_qwen.kernels.grouped_mlp.inputs import Inputs
from megatron_qwen.kernels.moe_permute import kernel as moe_permute
from megatron_qwen.kernels.moe_permute import op as permute_op
from megatron_qwen.kernels.moe_routing import kernel as moe_routing
from megatron_qwen.kernels.moe_routing import op as routing_op
from megatron_qwen.testing.aot import MachineCode, compile_launches

TOKENS = 8192
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGER = torch.int64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    experts: int
    topk: int
    hidden: int
    width: int
    shared: int


MODELS = {
    "a2.7b": Sizes(experts=60, topk=4, hidden=2048, width=1408, shared=5632),
    "57b-a14b": Sizes(experts=64, topk=8, hidden=3584, width=2560, shared=20480),
    "odd": Sizes(experts=7, topk=3, hidden=1001, width=333, shared=999),
}


def launch_routing(sizes: Sizes, dtype: torch.dtype) -> None:
    logits, experts = meta(TOKENS, sizes.experts, dtype=dtype), meta(TOKENS, sizes.topk, dtype=INTEGER)
    weights, sums = meta(TOKENS, sizes.topk, dtype=torch.float32), meta(sizes.experts, dtype=torch.float32)
    counts, offsets = meta(sizes.experts, dtype=INTEGER), meta(sizes.experts + 1, dtype=INTEGER)
    for renormalize in (False, True):
        moe_routing.launch_forward(logits, renormalize, weights, experts, counts, offsets, sums, sums[0])
        moe_routing.launch_backward(weights, sums, sums[0], logits, experts, renormalize, logits)


def launch_permute(sizes: Sizes, dtype: torch.dtype) -> None:
    rows = TOKENS * sizes.topk
    x, y = meta(TOKENS, sizes.hidden, dtype=dtype), meta(rows, sizes.hidden, dtype=dtype)
    experts, source = meta(TOKENS, sizes.topk, dtype=INTEGER), meta(rows, dtype=INTEGER)
    weights = meta(TOKENS, sizes.topk, dtype=torch.float32)
    moe_permute.launch_order(experts, source, experts, meta(sizes.experts + 1, dtype=INTEGER))
    for given in (None, weights):
        moe_permute.launch_gather(x, source, sizes.topk, given, y)
        moe_permute.launch_gather_sum(y, experts, given, x)
    moe_permute.launch_weight_gradient(x, y, experts, weights)


def launch_experts(sizes: Sizes, dtype: torch.dtype) -> None:
    """The whole layer with a gated shared expert, gradients added to fp32 buffers and not."""
    rows = TOKENS * sizes.topk
    x, weights = meta(TOKENS, sizes.hidden, dtype=dtype), meta(TOKENS, sizes.topk, dtype=torch.float32)
    order = meta(sizes.experts + 1, dtype=INTEGER), meta(rows, dtype=INTEGER), meta(TOKENS, sizes.topk, dtype=INTEGER)
    fc1 = [meta(2 * sizes.width, sizes.hidden, dtype=dtype)] * sizes.experts
    fc2 = [meta(sizes.hidden, sizes.width, dtype=dtype)] * sizes.experts
    shapes = (2 * sizes.shared, sizes.hidden), (sizes.hidden, sizes.shared), (1, sizes.hidden)
    shared = [meta(*shape, dtype=dtype) for shape in shapes]
    inputs = Inputs(x, weights, *order, fc1, fc2, shared)
    _, *kept = grouped_mlp.forward(inputs, keep=True)
    grouped_mlp.backward(x, inputs, *kept)
    buffers = [each.float() for each in (*fc1, *fc2, *shared)]
    grouped_mlp.backward(x, inputs, *kept, buffers)


def launch_block(sizes: Sizes, dtype: torch.dtype) -> None:
    """All that a training step runs of the three operations; the host cannot read a value of a meta tensor."""
    x, logits = meta(TOKENS, sizes.hidden, dtype=dtype), meta(TOKENS, sizes.experts, dtype=dtype)
    weights, experts, _, _, sums, z_sum = routing_op._forward(logits, sizes.topk, False)
    source, positions, offsets = permute_op._order(experts, sizes.experts)
    fc1 = [meta(2 * sizes.width, sizes.hidden, dtype=dtype)] * sizes.experts
    fc2 = [meta(sizes.hidden, sizes.width, dtype=dtype)] * sizes.experts
    shapes = (2 * sizes.shared, sizes.hidden), (sizes.hidden, sizes.shared), (1, sizes.hidden)
    inputs = Inputs(x, weights, offsets, source, positions, fc1, fc2, [meta(*shape, dtype=dtype) for shape in shapes])
    y, *kept = mlp_op._forward(*inputs, False)
    _, grad_weights, *_ = mlp_op._backward(y, *inputs, *kept)
    routing_op._backward(grad_weights, sums, z_sum, logits, experts, False)


def launches() -> dict[str, Callable[[], None]]:
    """Launch by label: operation, model, dtype."""
    operations = {
        "routing": launch_routing,
        "permute": launch_permute,
        "experts": launch_experts,
        "block": launch_block,
    }
    return {
        f"{operation} {model} {label}": lambda launch=launch, sizes=sizes, dtype=dtype: launch(sizes, dtype)
        for operation, launch in operations.items()
        for model, sizes in MODELS.items()
        for label, dtype in DTYPES.items()
    }


def facts(label: str, code: MachineCode) -> dict[str, object]:
    return {
        "label": label,
        "kernel": code.name,
        "architecture": code.architecture,
        "registers": code.registers,
        "spilled": code.stack_bytes + code.local_bytes + code.spills,
        "shared": code.shared_bytes,
        "wgmma": code.count(r"HGMMA[.\w]*"),
        "mma": code.count(r"HMMA[.\w]*"),
        "asynchronous": code.count(r"LDGSTS[.\w]*"),
        "wide_asynchronous": code.count(r"LDGSTS[.\w]*\.128[.\w]*"),
        "wide_loads": code.count(r"LDG\.E[.\w]*\.128[.\w]*"),
        "wide_stores": code.count(r"STG\.E[.\w]*\.128[.\w]*"),
        "atomics": code.count(r"(?:ATOM|RED)G?\b[.\w]*"),
    }


if __name__ == "__main__":
    architecture, wanted = int(sys.argv[1]), sys.argv[2:]
    table = launches()
    backends._obstacle = lambda *arguments: ""  # Triton takes meta tensors here
    with ops.use_backend("triton"):
        codes = [(label, code) for label in wanted or table for code in compile_launches(table[label], architecture)]
    print(json.dumps([facts(label, code) for label, code in codes]))
