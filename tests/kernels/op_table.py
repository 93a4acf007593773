"""Every operation of `megatron_qwen.ops`, with inputs and a definition: what test_op_properties.py sweeps over.

A new operation is one more entry of `CASES`. Its own test file has what only it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dual_chunk_checks
import linear_cross_entropy_checks
import moe_checks
import op_checks
import torch
from op_checks import random

from megatron_qwen import ops

Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One function of `ops`.

    Attributes:
        function: takes `arguments` by name.
        arguments: of a number of rows and a dtype: valid ones.
        leaves: arguments that have a gradient; the first may have any distance between its rows.
        plain: the definition in torch operations, from the same arguments.
        registered: operations of the namespace `megatron_qwen` that it runs, without their gradients.
        outputs: the differentiable ones of what `function` returns.
        is_dense: whether the first leaf has to be contiguous.
        sizes: rows to compare with fp64 at; the others are in the operation's own test file.
        narrowed: arguments whose last axis has to fit another's, so that one column less is an error.
        kernel_arguments: as `arguments`, of sizes that kernels take, where those are smaller.
        row_distance: the largest distance between rows that kernels take, 2^30 or less.
    """

    function: Callable[..., Any]
    arguments: Callable[[int, torch.dtype], Arguments]
    leaves: tuple[str, ...]
    plain: Callable[..., Any]
    registered: tuple[str, ...]
    narrowed: tuple[str, ...]
    outputs: Callable[[Any], Any] = field(default=lambda result: result)
    is_dense: bool = False
    sizes: tuple[int, ...] = (0, 1, 7, 31, 32, 33)
    kernel_arguments: Callable[[int, torch.dtype], Arguments] | None = None
    row_distance: int = 2**30

    def run(self, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """The differentiable results."""
        out = self.outputs(self.function(**arguments))
        return (out,) if isinstance(out, torch.Tensor) else tuple(out)

    def of_leaves(self, arguments: Arguments, plain: bool = False) -> Callable[..., tuple[torch.Tensor, ...]]:
        """`run`, or the definition, as a function of the leaves alone; the rest stays as in `arguments`."""

        def call(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = {**arguments, **dict(zip(self.leaves, leaves, strict=True))}
            if not plain:
                return self.run(given)
            # In fp64 the tables are wide, too, as the operation wants them.
            out = self.plain(**given)
            return (out,) if isinstance(out, torch.Tensor) else tuple(out)

        return call

    def tensors(self, arguments: Arguments) -> list[torch.Tensor]:
        """The leaves."""
        return [arguments[name] for name in self.leaves]


def _weight(width: int, dtype: torch.dtype) -> torch.Tensor:
    return (random((width,), torch.float32, seed=2) * 0.2 + 1.0).to(dtype)


def _qkv_rope(rows: int, dtype: torch.dtype) -> Arguments:
    angles = torch.outer(torch.arange(64).double(), torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64))
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "packed": random((rows, 2 * 4 * 8), dtype, seed=0),
        "cos": angles.cos().to(wide),
        "sin": angles.sin().to(wide),
        "num_groups": 2,
        "head_dim": 8,
        "bias": random((64,), dtype, seed=1),
        "positions": torch.arange(rows) % 5,
    }


def _plain_qkv_rope(packed, cos, sin, num_groups, head_dim, bias, positions) -> Any:  # type: ignore[no-untyped-def]
    freqs = positions.double()[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    return op_checks.plain_qkv_rope(packed, bias, num_groups, head_dim, freqs, 1.0)


def _rope(rows: int, dtype: torch.dtype) -> Arguments:
    tables = {name: value for name, value in _qkv_rope(rows, dtype).items() if name in ("cos", "sin", "positions")}
    return {"q": random((rows, 3 * 8), dtype, seed=0), "k": random((rows, 2 * 8), dtype, seed=1), **tables}


def _rope_of_copies(q, k, **tables) -> Any:  # type: ignore[no-untyped-def]
    """In place on copies with rows as far apart: a leaf must not be overwritten, nor the arguments of other tests."""
    copies = (each.new_empty_strided(each.shape, each.stride()).copy_(each) for each in (q, k))
    sized = zip(copies, (3, 2), strict=True)
    return ops.rope_(*(each.unflatten(-1, (heads, 8)) if each.dim() else each for each, heads in sized), **tables)


def _plain_rope(q, k, cos, sin, positions) -> Any:  # type: ignore[no-untyped-def]
    freqs = positions.double()[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    return tuple(op_checks.plain_rotate(each.unflatten(-1, (heads, 8)), freqs) for each, heads in ((q, 3), (k, 2)))


def _order(rows: int) -> ops.ExpertOrder:
    return ops.expert_order(moe_checks.some_experts(rows, 5, 2), 5)


def _labels(rows: int) -> torch.Tensor:
    labels = torch.arange(rows) * 3 % 11
    labels[2::3] = linear_cross_entropy_checks.IGNORED
    return labels


def _plain_unpermute(y: torch.Tensor, order: ops.ExpertOrder, weights: torch.Tensor) -> torch.Tensor:
    terms = y[order.positions].to(torch.promote_types(y.dtype, torch.float32))
    return (terms * weights.unsqueeze(-1)).sum(1).to(y.dtype)


_OFFSETS = (0.0, 0.4, 0.4, 1.0)  # of three experts, as fractions of the rows; the second has none


def _experts(rows: int, dtype: torch.dtype) -> Arguments:
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": random((rows, 8), dtype, seed=0),
        "weights": random((rows,), wide, seed=1),
        "offsets": torch.tensor([int(rows * part) for part in _OFFSETS]),
        "fc1": random((3, 10, 8), dtype, seed=2, scale=0.4),
        "fc2": random((3, 8, 5), dtype, seed=3, scale=0.4),
    }


def _grouped_mlp(x, weights, offsets, fc1, fc2) -> torch.Tensor:  # type: ignore[no-untyped-def]
    matrices = ([each] if each.dim() < 3 else list(each) for each in (fc1, fc2))
    return ops.grouped_mlp(x, weights, offsets, *matrices)


def _plain_grouped_mlp(x, weights, offsets, fc1, fc2) -> torch.Tensor:  # type: ignore[no-untyped-def]
    bounds = offsets.tolist()
    parts = [
        (op_checks.plain_swiglu(x[start:end] @ first.t()) * weights[start:end, None].to(x.dtype)) @ second.t()
        for start, end, first, second in zip(bounds, bounds[1:], fc1, fc2, strict=False)
    ]
    return torch.cat(parts)


_CHUNKS = ops.ChunkLayout.released(16, 3)


def _attention(rows: int, dtype: torch.dtype, head_dim: int = 8, rotated: int = 6) -> Arguments:
    cos, sin = dual_chunk_checks.tables(17, dtype, rotated)
    return {
        "q": random((rows, 4 * head_dim), dtype, seed=0),
        "k": random((rows, 2 * head_dim), dtype, seed=1),
        "v": random((rows, 2 * head_dim), dtype, seed=2),
        "cos": cos,
        "sin": sin,
        "cu_seqlens": torch.tensor([0, rows // 3, rows // 3, rows]),
        "logit_scale": 1.0 + 0.5 * torch.rand(rows, generator=torch.Generator().manual_seed(3)).to(cos.dtype),
    }


def _dual_chunk_attention(q, k, v, cos, sin, cu_seqlens, logit_scale) -> torch.Tensor:  # type: ignore[no-untyped-def]
    counts = ((q, 4), (k, 2), (v, 2))
    heads = (each.unflatten(-1, (number, -1)) if each.dim() else each for each, number in counts)
    return ops.dual_chunk_attention(
        *heads,
        chunks=_CHUNKS,
        tables=(cos, sin),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        logit_scale=logit_scale,
    )[0]


def _plain_dual_chunk_attention(q, k, v, cos, sin, cu_seqlens, logit_scale) -> torch.Tensor:  # type: ignore[no-untyped-def]
    parts = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        heads = (each[start:end].unflatten(-1, (-1, 8)) for each in (q, k, v))
        parts.append(dual_chunk_checks.plain(*heads, _CHUNKS, (cos, sin), logit_scale=logit_scale[start:end])[0])
    return torch.cat(parts)


CASES: dict[str, Case] = {
    "swiglu": Case(
        function=ops.swiglu,
        arguments=lambda rows, dtype: {"packed": random((rows, 26), dtype, seed=0, scale=3.0)},
        leaves=("packed",),
        plain=op_checks.plain_swiglu,
        registered=("swiglu",),
        narrowed=("packed",),
    ),
    "rms_norm": Case(
        function=ops.rms_norm,
        arguments=lambda rows, dtype: {
            "x": random((rows, 13), dtype, seed=0),
            "weight": _weight(13, dtype),
            "eps": op_checks.EPS,
        },
        leaves=("x", "weight"),
        plain=lambda x, weight, eps: op_checks.plain_rms_norm(x, weight),
        registered=("rms_norm",),
        narrowed=("weight",),
    ),
    "add_rms_norm": Case(
        function=ops.add_rms_norm,
        arguments=lambda rows, dtype: {
            "x": random((rows, 13), dtype, seed=0),
            "residual": random((rows, 13), dtype, seed=1),
            "weight": _weight(13, dtype),
            "eps": op_checks.EPS,
        },
        leaves=("x", "residual", "weight"),
        plain=lambda x, residual, weight, eps: op_checks.plain_add_rms_norm(x, residual, weight),
        registered=("add_rms_norm",),
        narrowed=("residual", "weight"),
    ),
    "qkv_rope": Case(
        function=ops.qkv_rope,
        arguments=_qkv_rope,
        leaves=("packed", "bias"),
        plain=_plain_qkv_rope,
        registered=("qkv_rope",),
        narrowed=("packed", "sin", "bias", "positions"),
    ),
    "rope_": Case(
        function=_rope_of_copies,
        arguments=_rope,
        leaves=("q", "k"),
        plain=_plain_rope,
        registered=("rope_",),
        narrowed=("sin", "positions"),
        sizes=(1, 7, 31, 32, 33),  # of no tokens: test_rope_op.py
    ),
    "linear_cross_entropy": Case(
        function=ops.linear_cross_entropy,
        arguments=lambda rows, dtype: {
            "hidden": random((rows, 12), dtype, seed=0),
            "weight": random((11, 12), dtype, seed=1, scale=0.5),
            "labels": _labels(rows),
            "z_loss": 0.1,
        },
        leaves=("hidden", "weight"),
        plain=lambda hidden, weight, labels, z_loss: linear_cross_entropy_checks.plain(
            hidden, weight, labels, 11, z_loss
        ),
        registered=("linear_cross_entropy",),
        narrowed=("weight", "labels"),
    ),
    "moe_routing": Case(
        function=ops.moe_routing,
        arguments=lambda rows, dtype: {
            "logits": random((rows, 9), dtype, seed=0, scale=2.0),
            "topk": 2,
            "renormalize": True,
        },
        leaves=("logits",),
        plain=lambda logits, topk, renormalize: moe_checks.plain_routing(logits, topk, renormalize)[:3],
        registered=("moe_routing",),
        narrowed=(),
        outputs=lambda out: (out.weights, out.probability_sums, out.z_sum),
        sizes=(1, 7, 31, 32, 33),  # of no tokens: moe_checks.check_routing_of_no_tokens
    ),
    "moe_permute": Case(
        function=ops.moe_permute,
        arguments=lambda rows, dtype: {"x": random((rows, 6), dtype, seed=0), "order": _order(rows)},
        leaves=("x",),
        plain=lambda x, order: x[order.source // 2],
        registered=("expert_order", "moe_permute"),
        narrowed=(),
    ),
    "moe_unpermute": Case(
        function=ops.moe_unpermute,
        arguments=lambda rows, dtype: {
            "y": random((2 * rows, 6), dtype, seed=0),
            "order": _order(rows),
            "weights": random((rows, 2), torch.promote_types(dtype, torch.float32), seed=1),
        },
        leaves=("y", "weights"),
        plain=_plain_unpermute,
        registered=("expert_order", "moe_unpermute"),
        narrowed=("weights",),
    ),
    "grouped_mlp": Case(
        function=_grouped_mlp,
        arguments=_experts,
        leaves=("x", "weights", "fc1", "fc2"),
        plain=_plain_grouped_mlp,
        registered=("grouped_mlp",),
        narrowed=("weights", "offsets", "fc1", "fc2"),
        is_dense=True,
    ),
}

CASES["dual_chunk_attention"] = Case(
    function=_dual_chunk_attention,
    arguments=_attention,
    leaves=("q", "k", "v"),
    plain=_plain_dual_chunk_attention,
    registered=("dual_chunk_attention", "paged_decode_attention", "sparse_prefill_attention"),
    narrowed=("sin", "cu_seqlens", "logit_scale"),
    sizes=(0, 2, 7, 31, 32, 33),  # of one key the gradient of q is 0: test_dual_chunk_attention_op.py
    kernel_arguments=lambda rows, dtype: _attention(rows, dtype, head_dim=64, rotated=64),
    row_distance=2**24,
)

# The other names of `ops`, and why they are no operations of their own.
NO_OPERATIONS = {
    **dict.fromkeys(
        ("BACKENDS", "OPERATIONS", "OpChoice", "choices", "explain_choice", "requested_backend", "use_backend"),
        "choice",
    ),
    **dict.fromkeys(("ExpertOrder", "Routing", "SharedExpert", "TokenLosses", "WeightGradient"), "a type"),
    **dict.fromkeys(("context_parallel_positions", "packed_positions", "rope_tables"), "made once, without gradient"),
    "ChunkLayout": "a type",
    "dual_chunk_attention_backward": "the gradient of dual_chunk_attention, by itself; test_dual_chunk_parts.py",
    "paged_decode_attention": "without a gradient; test_dual_chunk_decode.py",
    **dict.fromkeys(("merge_attention", "log_length_temperature", "prescaled_keys"), "a few torch operations"),
    **dict.fromkeys(("HeadBudget", "Refinement", "SparseAttentionConfig", "SparseIndex"), "a type"),
    "sparse_prefill_attention": "without a gradient; test_sparse_attention.py, test_sparse_interpreter.py",
    **dict.fromkeys(
        ("attention_recall", "estimate_index", "refined_budgets"), "plain torch; test_sparse_estimation.py"
    ),
    "moe_mlp": "grouped_mlp with the rows of another order; its own test file",
    "expert_order": "integers: covered with moe_permute",
    "linear_cross_entropy_terms": "linear_cross_entropy with more results",
    **dict.fromkeys(("huggingface_balance_loss", "megatron_balance_loss", "z_loss"), "a few torch operations on sums"),
}
