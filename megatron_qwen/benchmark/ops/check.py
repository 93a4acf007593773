"""Nobody's speed is measured before its results are right: against fp64, with poisoned outputs.

The reference is computed in pieces of tokens, so that a 72B shape fits beside its own results; gradients of what has
no token axis are summed over the pieces in fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_qwen.benchmark.ops.case import OpCase, Results, Workload, copies, results
from megatron_qwen.benchmark.ops.contestants import OpContestant
from megatron_qwen.testing.compare import Comparison, compare, fp64_bound, largest_finite
from megatron_qwen.testing.poison import poisoned_outputs

# How many times plain torch's error a contestant may make. Ours: the rule of this project. Peers round where we do not
# (Liger's RMSNorm before the weight, a chain in bf16 after every step) and are only kept from doing other work.
OUR_FACTOR, PEER_FACTOR = 2.0, 8.0
# fp64 numbers of the widest tensor in one piece.
_PIECE = {"cuda": 2**27, "cpu": 2**23}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a contestant's results are right.

    Attributes:
        is_right: within the bound everywhere.
        detail: the worst result; the error, where it raised one.
        error: the largest difference of that result from fp64.
        bound: what was allowed.
    """

    is_right: bool
    detail: str
    error: float = 0.0
    bound: float = 0.0


@dataclass
class _Seen:
    """What one result of one contestant has shown so far: its worst piece, and the tokens before that."""

    worst: Comparison | None = None

    def add(self, found: torch.Tensor, exact: torch.Tensor, begin: int) -> None:
        here = compare(found, exact, float("inf"))
        if begin:
            here = replace(here, worst=_moved(here.worst, begin), mismatched=_all_moved(here.mismatched, begin))
        if self.worst is None or here.mismatched or (not self.worst.mismatched and here.error > self.worst.error):
            self.worst = here


def check_contestants(case: OpCase, workload: Workload, contestants: list[OpContestant]) -> dict[str, Verdict]:
    """Return a verdict for every contestant that has a function, by name.

    Args:
        case: gives the definition, in fp64 and (for the error that is allowed) in the workload's dtype.
        workload: the tensors that are timed afterwards.
        contestants: those without a function are passed over.
    """
    plainly = _plainly(case, workload)
    yardsticks = {"": plainly, **_yardsticks(case, workload)}
    found: dict[str, Results] = {}
    verdicts = {}
    for each in contestants:
        if each.function is None:
            continue
        try:
            found[each.name] = _results_of(case, workload, each)
            _require_same_kind(found[each.name], plainly)
        except Exception as error:  # a kernel may fail in any way; that is what the report is to say
            found.pop(each.name, None)
            verdicts[each.name] = Verdict(is_right=False, detail=f"{type(error).__name__}: {error}".strip())
    seen, largest = _compare_in_pieces(case, workload, {**found, **yardsticks})
    allowed = _allowed([seen[name] for name in yardsticks])
    for each in contestants:
        if each.name in found:
            factor = OUR_FACTOR if each.is_ours else PEER_FACTOR
            verdicts[each.name] = _judge(seen[each.name], allowed, largest, found[each.name], factor)
    return verdicts


def _plainly(case: OpCase, workload: Workload) -> Results:
    """Plain torch's results in the workload's dtype; NaN for tokens that are not compared."""
    if not workload.compared:
        return results(case, workload, case.plain)
    assert not case.has_gradient, case.name
    whole: Results = {}
    for begin, end in workload.compared:
        for name, piece in results(case, workload.slice(begin, end), case.plain).items():
            if name not in whole:
                whole[name] = piece.new_full((workload.num_tokens(), *piece.shape[1:]), float("nan"))
            whole[name][begin:end] = piece
    return whole


def _yardsticks(case: OpCase, workload: Workload) -> dict[str, Results]:
    if next(iter(workload.leaves.values())).dtype != torch.float32:
        return {}
    return {f"yardstick {i}": results(case, workload, each) for i, each in enumerate(case.fp32_yardsticks)}


def _allowed(yardsticks: list[dict[str, _Seen]]) -> dict[str, float]:
    """The error of plain torch for each result, of a gradient the largest of all yardsticks."""
    plain, *others = yardsticks
    return {
        name: max(_error(each[name]) for each in (plain, *(others if name.startswith("d ") else ()))) for name in plain
    }


def _error(seen: _Seen) -> float:
    assert seen.worst is not None
    return seen.worst.error


def _results_of(case: OpCase, workload: Workload, contestant: OpContestant) -> Results:
    assert contestant.function is not None
    # torch.compile would compile the replaced torch.empty, and allocates without it.
    poisoned = contextlib.nullcontext() if contestant.name == "compile" else poisoned_outputs()
    # Liger's kernels write over what they are given where its strides let them.
    fresh = replace(workload, leaves=copies(workload.leaves), grads=tuple(grad.clone() for grad in workload.grads))
    with contestant.scope(), poisoned:
        return results(case, fresh, contestant.function)


def _require_same_kind(found: Results, plainly: Results) -> None:
    for name, plain in plainly.items():
        mine = found[name]
        if mine.shape != plain.shape or mine.dtype != plain.dtype:
            raise ValueError(f"{name} is {mine.dtype} {tuple(mine.shape)}, not {plain.dtype} {tuple(plain.shape)}")


def _compare_in_pieces(
    case: OpCase, workload: Workload, found: Mapping[str, Results]
) -> tuple[dict[str, dict[str, _Seen]], dict[str, float]]:
    seen = {who: {name: _Seen() for name in mine} for who, mine in found.items()}
    largest: dict[str, float] = dict.fromkeys(found[""], 0.0)
    sums: Results = {}
    for begin, end in _pieces(workload):
        exact = results(case, workload.slice(begin, end).wide(), case.plain)
        for name, piece in exact.items():
            if name.removeprefix("d ") in workload.shared:
                sums[name] = sums[name] + piece if name in sums else piece
                continue
            largest[name] = max(largest[name], largest_finite(piece))
            for who, mine in found.items():
                seen[who][name].add(mine[name][begin:end], piece, begin)
    for name, total in sums.items():
        largest[name] = largest_finite(total)
        for begin, end in _rows_at_once(total):
            for who, mine in found.items():
                seen[who][name].add(_rows(mine[name], begin, end), _rows(total, begin, end), begin)
    return seen, largest


def _rows_at_once(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """The gradient of a vocabulary's weight is compared in pieces too: fp64 copies of it all would not fit."""
    rows = tensor.shape[0] if tensor.dim() else 1
    step = max(1, _PIECE[tensor.device.type] * rows // tensor.numel())
    return ((begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _rows(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return tensor[begin:end] if tensor.dim() else tensor


def _pieces(workload: Workload) -> Iterator[tuple[int, int]]:
    tokens = workload.num_tokens()
    # The logits of a loss are no tensor of the workload; its weight has as many rows as they have columns.
    widest = max(
        leaf.shape[0] if name in workload.shared else leaf.numel() // tokens for name, leaf in workload.leaves.items()
    )
    widest = max(widest, workload.width)
    step = max(1, _PIECE[next(iter(workload.leaves.values())).device.type] // widest)
    for first, last in workload.compared or ((0, tokens),):
        yield from ((begin, min(begin + step, last)) for begin in range(first, last, step))


def _judge(
    mine: Mapping[str, _Seen], allowed: Mapping[str, float], largest: Mapping[str, float], found: Results, factor: float
) -> Verdict:
    worst, worst_name, worst_share = None, "", -1.0
    for name, seen in mine.items():
        assert seen.worst is not None
        bound = fp64_bound(allowed[name], largest[name], found[name].dtype, factor=factor)
        judged = replace(seen.worst, bound=bound)
        share = float("inf") if judged.mismatched else judged.error / bound if bound else float(judged.error > 0)
        if share > worst_share:
            worst, worst_name, worst_share = judged, name, share
    assert worst is not None
    return Verdict(is_right=worst.ok, detail=f"{worst_name}: {worst}", error=worst.error, bound=worst.bound)


def _moved(where: tuple[int, ...], begin: int) -> tuple[int, ...]:
    return (where[0] + begin, *where[1:])


def _all_moved(where: tuple[tuple[int, ...], ...], begin: int) -> tuple[tuple[int, ...], ...]:
    return tuple(_moved(each, begin) for each in where)
