"""MoE layers: routing, the experts on rows in order, all from tokens to tokens, and the whole layer.

Which experts tokens choose is drawn in three ways: "uniform", "skewed" (expert e is e + 1 times less popular than the
first, squared root) and "real" (as a trained router spread them; see `router_loads.py`). Weights are matrices of their
own for us and for plain torch, and one tensor [E, ...] for peers that want that: nobody pays for putting them together.

Shapes: T tokens, k experts per token, R = T k rows in expert order, H hidden, E experts, F and Fs widths of a routed
and the shared expert. x [T, H], weights [T, k], choice [T, k], fc1 [E, 2F, H], fc2 [E, H, F].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function, OpCase, Sizes, Workload, random_normal, takes_lists
from megatron_qwen.benchmark.ops.router_loads import shares_of_experts
from megatron_qwen.model.config import QwenConfig

Matrices = Sequence[torch.Tensor]


def _sizes(config: QwenConfig, length: int, *, has_shared: bool = False) -> dict[str, int]:
    if not config.num_experts or not config.num_experts_per_tok:
        return {}
    sizes = {
        "tokens": length,
        "hidden": config.hidden_size,
        "experts": config.num_experts,
        "topk": config.num_experts_per_tok,
        "ffn": config.moe_intermediate_size,
    }
    return sizes | ({"shared": config.shared_expert_intermediate_size} if has_shared else {})


def _router_sizes(config: QwenConfig, length: int) -> dict[str, int]:
    return {name: size for name, size in _sizes(config, length).items() if name in ("tokens", "experts", "topk")}


def _narrow(sizes: dict[str, int]) -> dict[str, int]:
    """An eighth of the widths: the reference in fp64 of a real layer takes a CPU minutes."""
    return {name: size // 8 if name in ("hidden", "ffn", "shared") else size for name, size in sizes.items()}


def popularity(experts: int, spread: str) -> list[float]:
    """Return the share of each expert in what tokens choose, by `spread`: "uniform", "skewed" or "real"."""
    if spread == "real":
        return shares_of_experts(experts)
    weights = [1.0 if spread == "uniform" else (index + 1) ** -0.5 for index in range(experts)]
    return [each / sum(weights) for each in weights]


def choose_experts(sizes: Sizes, spread: str, device: torch.device, seed: int) -> torch.Tensor:
    """Return k different experts of every token, int64 [T, k]; each drawn with its popularity among those left."""
    shares = torch.tensor(popularity(sizes["experts"], spread), device=device)
    uniform = torch.rand(
        (sizes["tokens"], sizes["experts"]), generator=torch.Generator(device).manual_seed(seed), device=device
    )
    # Gumbel top-k: the largest of log p - log(-log u) are draws without replacement.
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
    return torch.topk(shares.clamp_min(1e-9).log() + gumbel, sizes["topk"]).indices


def _matrices(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    experts, hidden, ffn = sizes["experts"], sizes["hidden"], sizes["ffn"]
    return {
        "fc1": random_normal((experts, 2 * ffn, hidden), dtype, device, seed, hidden**-0.5),
        "fc2": random_normal((experts, hidden, ffn), dtype, device, seed + 1, ffn**-0.5),
    }


def _mlp_workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, *, spread: str) -> Workload:
    tokens, hidden = sizes["tokens"], sizes["hidden"]
    weights = torch.softmax(random_normal((tokens, sizes["topk"]), torch.float32, device, seed + 2), dim=-1)
    return Workload(
        leaves={
            "x": random_normal((tokens, hidden), dtype, device, seed + 3),
            "weights": weights,
            **_matrices(sizes, dtype, device, seed + 4),
        },
        others={"choice": choose_experts(sizes, spread, device, seed + 6)},
        grads=(random_normal((tokens, hidden), dtype, device, seed + 7),),
        shared=frozenset({"fc1", "fc2"}),
        listed=frozenset({"fc1", "fc2"}),
        width=sizes["topk"] * 2 * sizes["ffn"],
    )


@takes_lists
def _mlp_ours(x: torch.Tensor, weights: torch.Tensor, fc1: Matrices, fc2: Matrices, choice: torch.Tensor) -> Any:
    return ops.moe_mlp(x, weights, ops.expert_order(choice, len(fc1)), fc1, fc2)


@takes_lists
def _mlp_plain(x: torch.Tensor, weights: torch.Tensor, fc1: Matrices, fc2: Matrices, choice: torch.Tensor) -> Any:
    """Sequential experts, as Megatron-Core's SequentialMLP and transformers' block compute them."""
    rows, back, counts = _sorted_rows(x, choice, len(fc1))
    pieces = torch.split(rows, counts.tolist())
    outputs = [_expert(piece, *matrices) for piece, *matrices in zip(pieces, fc1, fc2, strict=True)]
    return _combine(torch.cat(outputs), back, weights)


def _mlp_grouped_mm() -> Function:
    """Return torch's grouped GEMM in the same chain: no loop, and nothing waits for the host."""

    def run(x: torch.Tensor, weights: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, choice: torch.Tensor) -> Any:
        rows, back, counts = _sorted_rows(x, choice, len(fc1))
        ends = counts.cumsum(0).int()
        gate, up = torch._grouped_mm(rows, fc1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        output = torch._grouped_mm(functional.silu(gate) * up, fc2.transpose(1, 2), offs=ends)
        return _combine(output, back, weights)

    return run


def _mlp_liger() -> Function:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(x: torch.Tensor, weights: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, choice: torch.Tensor) -> Any:
        return LigerFusedMoEFunction.apply(x, fc1, fc2, choice, weights)

    return run


def _sorted_rows(
    x: torch.Tensor, choice: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows in expert order [R, H], where each choice's row is [T, k], and the rows of each expert [E]."""
    source = choice.flatten().argsort(stable=True)
    back = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=source.device))
    counts = functional.one_hot(choice.flatten(), experts).sum(0)
    return x.index_select(0, source // choice.shape[1]), back.view(choice.shape), counts


def _expert(rows: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    gate, up = functional.linear(rows, fc1).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, fc2)


def _combine(rows: torch.Tensor, back: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    of_tokens = torch.unflatten(rows.index_select(0, back.flatten()), 0, back.shape)
    return (of_tokens * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def _layer_workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    """Tokens that the router sends where `choose_experts` says, by a margin that no rounding crosses."""
    hidden, shared = sizes["hidden"], sizes["shared"]
    start = _mlp_workload(sizes, dtype, device, seed, spread="skewed")
    # Orthogonal rows: a token's logit of an expert is then its own part along that row.
    router = torch.linalg.qr(random_normal((hidden, sizes["experts"]), torch.float32, device, seed + 8))[0].t()
    x, choice = start.leaves["x"].float(), start.others["choice"]
    margins = torch.arange(sizes["topk"], 0, -1, device=device) + 1.0
    logits = random_normal((len(x), sizes["experts"]), torch.float32, device, seed + 9, 0.2)
    logits.scatter_(1, choice, 2.0 * margins.expand(len(x), -1))
    x = x - x @ router.t() @ router + logits @ router
    leaves = {
        "x": x.to(dtype),
        "router": router.to(dtype).contiguous(),
        **{name: start.leaves[name] for name in ("fc1", "fc2")},
        "shared_fc1": random_normal((2 * shared, hidden), dtype, device, seed + 10, hidden**-0.5),
        "shared_fc2": random_normal((hidden, shared), dtype, device, seed + 11, shared**-0.5),
        "shared_gate": random_normal((1, hidden), dtype, device, seed + 12, hidden**-0.5),
    }
    return Workload(
        leaves=leaves,
        others={},
        grads=start.grads,
        shared=frozenset(leaves) - {"x"},
        constants={"topk": sizes["topk"]},
        listed=start.listed,
        width=start.width + 2 * shared,
    )


@takes_lists
def _layer_ours(
    x: torch.Tensor, router: torch.Tensor, fc1: Matrices, fc2: Matrices, topk: int, **shared: torch.Tensor
) -> Any:
    routing = ops.moe_routing(functional.linear(x, router), topk, renormalize=False)
    expert = ops.SharedExpert(shared["shared_fc1"], shared["shared_fc2"], shared["shared_gate"])
    order = ops.expert_order(routing.experts, len(fc1))
    return ops.moe_mlp(x, routing.weights, order, fc1, fc2, shared=expert)


def _layer_of(routed: Function) -> Function:
    """Return the layer around a peer's routed experts: torch's softmax and top-k, and a shared expert by cuBLAS."""

    def run(x: torch.Tensor, router: torch.Tensor, fc1: Any, fc2: Any, topk: int, **shared: torch.Tensor) -> Any:
        logits = functional.linear(x, router)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights, choice = torch.topk(torch.softmax(logits, dim=-1, dtype=wide), topk)
        output = _expert(x, shared["shared_fc1"], shared["shared_fc2"])
        gate = torch.sigmoid(functional.linear(x, shared["shared_gate"]))
        return routed(x, weights, fc1, fc2, choice) + gate * output

    return takes_lists(run) if getattr(routed, "takes_lists", False) else run


def _routing_workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    """Logits without ties, in every dtype: a different multiple of 1/16 for each expert of a token."""
    tokens, experts = sizes["tokens"], sizes["experts"]
    places = random_normal((tokens, experts), torch.float32, device, seed).argsort(dim=1)
    return Workload(
        leaves={"logits": (places / 16.0 - 2.0).to(dtype)},
        others={},
        grads=(
            random_normal((tokens, sizes["topk"]), torch.float32, device, seed + 1),
            random_normal((experts,), torch.float32, device, seed + 2),
            random_normal((), torch.float32, device, seed + 3),
        ),
        shared=frozenset({"logits", "weights", "probability_sums", "z_sum"}),
        constants={"topk": sizes["topk"]},
    )


def _routing_ours(logits: torch.Tensor, topk: int) -> tuple[torch.Tensor, ...]:
    routing = ops.moe_routing(logits, topk, renormalize=False)
    return routing.weights, routing.probability_sums, routing.z_sum


def _routing_plain(logits: torch.Tensor, topk: int) -> tuple[torch.Tensor, ...]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = torch.softmax(wide, dim=-1)
    return torch.topk(probabilities, topk).values, probabilities.sum(0), wide.logsumexp(-1).square().sum()


def _mlp_flops(sizes: Sizes, direction: str) -> int:
    """Three matrices of every row, twice as much again in backward; recomputed activations do not count."""
    rows = sizes["tokens"] * sizes["topk"]
    return {"forward": 6, "both": 18}[direction] * rows * sizes["hidden"] * sizes["ffn"]


def _layer_flops(sizes: Sizes, direction: str) -> int:
    """The experts, the shared one, and the products with router and gate."""
    tokens, hidden = sizes["tokens"], sizes["hidden"]
    beside = {"forward": 2, "both": 6}[direction] * tokens * hidden * (3 * sizes["shared"] + sizes["experts"] + 1)
    return _mlp_flops(sizes, direction) + beside


def _mlp_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """X, y and the matrices; with backward their gradients, the matrices once more; fp32 weights, int64 choices."""
    tokens, hidden = sizes["tokens"], sizes["hidden"]
    matrices = 3 * sizes["experts"] * hidden * sizes["ffn"]
    once = element * (2 * tokens * hidden + matrices) + (4 + 8) * tokens * sizes["topk"]
    return once if direction == "forward" else once + element * (3 * tokens * hidden + 2 * matrices)


def _layer_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """As the experts alone, with the shared expert's matrices, the router and the gate."""
    beside = sizes["hidden"] * (3 * sizes["shared"] + sizes["experts"] + 1)
    return _mlp_bytes(sizes, direction, element) + {"forward": 1, "both": 3}[direction] * element * beside


def _routing_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Forward: logits, weights (fp32), experts (int64); backward: those but the weights, their gradient, d logits."""
    tokens, experts, topk = sizes["tokens"], sizes["experts"], sizes["topk"]
    return element * tokens * experts * {"forward": 1, "backward": 2}[direction] + (4 + 8) * tokens * topk


def _routing_flops(sizes: Sizes, direction: str) -> int:
    """Forward: subtract, exponential, add, divide, add up; backward: the softmax's three, and two of the losses."""
    del direction
    return 5 * sizes["tokens"] * sizes["experts"]


_ODD = (
    {"tokens": 1, "hidden": 16, "experts": 3, "topk": 1, "ffn": 8, "shared": 24},
    {"tokens": 67, "hidden": 136, "experts": 7, "topk": 3, "ffn": 40, "shared": 120},
    {"tokens": 33, "hidden": 264, "experts": 60, "topk": 4, "ffn": 88, "shared": 8},
)
_MODELS = {"cuda": ("57b", "a2.7b"), "cpu": ("a2.7b",)}
_PEERS: dict[str, Callable[[], Function]] = {"grouped_mm": _mlp_grouped_mm, "liger": _mlp_liger}


def _without_shared(sizes: Sizes) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name != "shared"}


def _mlp_case(name: str, spread: str, lengths: tuple[int, ...], odd_sizes: tuple[Sizes, ...]) -> OpCase:
    return OpCase(
        name=name,
        family="experts",
        operation="grouped_mlp",
        about=f"routed experts, tokens to tokens, choices {spread}",
        outputs=("y",),
        directions=("forward", "both"),
        bound="compute",
        sizes=_sizes,
        workload=functools.partial(_mlp_workload, spread=spread),
        ours=_mlp_ours,
        plain=_mlp_plain,
        peers=_PEERS,
        bytes_moved=_mlp_bytes,
        flops=_mlp_flops,
        odd_sizes=odd_sizes,
        lengths={"cuda": lengths, "cpu": (256,)},
        models=_MODELS,
        is_compilable=False,
        on_cpu=_narrow,
    )


CASES = (
    OpCase(
        name="moe_routing",
        family="experts",
        operation="moe_routing",
        about="softmax, top-k, and the sums of the router's losses",
        outputs=("weights", "probability_sums", "z_sum"),
        sizes=_router_sizes,
        workload=_routing_workload,
        ours=_routing_ours,
        plain=_routing_plain,
        bytes_moved=_routing_bytes,
        flops=_routing_flops,
        odd_sizes=tuple({name: each[name] for name in ("tokens", "experts", "topk")} for each in _ODD),
        lengths={"cuda": (8192,), "cpu": (256,)},
        models=_MODELS,
    ),
    OpCase(
        name="moe_layer",
        family="experts",
        operation="grouped_mlp",
        about="router, routed and gated shared experts",
        outputs=("y",),
        directions=("forward", "both"),
        bound="compute",
        sizes=functools.partial(_sizes, has_shared=True),
        workload=_layer_workload,
        ours=_layer_ours,
        plain=_layer_of(_mlp_plain),
        peers={name: lambda make=make: _layer_of(make()) for name, make in _PEERS.items()},  # type: ignore[misc]
        bytes_moved=_layer_bytes,
        flops=_layer_flops,
        odd_sizes=_ODD,
        lengths={"cuda": (8192,), "cpu": (256,)},
        models=_MODELS,
        is_compilable=False,
        on_cpu=_narrow,
    ),
    _mlp_case("moe_mlp", "skewed", (8192, 4096), tuple(map(_without_shared, _ODD))),
    _mlp_case("moe_mlp_uniform", "uniform", (8192,), tuple(map(_without_shared, _ODD[1:]))),
    _mlp_case("moe_mlp_real", "real", (8192,), tuple(map(_without_shared, _ODD[1:]))),
)
