"""Every rule that a parallel layout must obey, on plain integers and before anything starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_qwen.errors import ConfigError

CP_COMM_TYPES = ("p2p", "all_gather")
"""How context-parallel ranks come by the keys, by Megatron-Core's names: around a ring, or all at once."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How many ways each axis of the model and of the data is split.

    Attributes:
        tp: tensor parallel size.
        pp: pipeline parallel size.
        vpp: virtual stages per pipeline rank (interleaved schedule).
        ep: expert parallel size.
        etp: tensor parallel size inside an expert; None means tp.
        cp: context parallel size.
        dp: data parallel size; None means world size / (tp * pp * cp).
        sequence_parallel: shard the activations between tensor-parallel regions along the sequence.
        pp_layout: decoder layers of each of the pp * vpp stages, in model order; None means even.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int | None = None
    sequence_parallel: bool = False
    pp_layout: tuple[int, ...] | None = None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together hold one copy of the dense parameters: tp * pp * cp."""
        return self.tp * self.pp * self.cp

    @property
    def expert_tensor_parallel_size(self) -> int:
        """etp, or tp where etp is not set."""
        return self.tp if self.etp is None else self.etp

    def resolve(self, world_size: int) -> ParallelLayout:
        """Return the layout with dp filled in for `world_size` ranks.

        Raises:
            ConfigError: the layout does not fit that number of ranks.
        """
        problems = list(_positive_problems(self, world_size)) or list(_world_problems(self, world_size))
        if problems:
            raise _error(problems)
        return dataclasses.replace(self, dp=world_size // self.model_parallel_size)

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Return the decoder layers of each of the pp * vpp stages, in model order.

        Stage i is virtual stage i // pp of pipeline rank i % pp.

        Raises:
            ConfigError: num_layers cannot be split so.
        """
        problems = list(_pipeline_problems(self, num_layers))
        if problems:
            raise _error(problems)
        return self.pp_layout or (num_layers // (self.pp * self.vpp),) * (self.pp * self.vpp)

    def transformer_config_fields(self, num_layers: int) -> dict[str, Any]:
        """Return the parallel fields of Megatron's TransformerConfig for a model of `num_layers` layers.

        An uneven split goes through `pipeline_model_parallel_layout`, which both supported versions read
        alike, with virtual stages too; the embedding sits in the first stage and the loss in the last.
        """
        stages = self.layers_per_stage(num_layers)
        fields: dict[str, Any] = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp if self.vpp > 1 else None,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.expert_tensor_parallel_size,
            "sequence_parallel": self.sequence_parallel,
        }
        if self.pp_layout is not None and self.pp > 1:
            parts = [["decoder"] * layers for layers in stages]
            fields["pipeline_model_parallel_layout"] = [["embedding", *parts[0]], *parts[1:-1], [*parts[-1], "loss"]]
        return fields

    @staticmethod
    def parse_pp_layout(text: str) -> tuple[int, ...]:
        """Read "3,5" as (3, 5).

        Raises:
            ConfigError: something else than counts of layers, separated by commas.
        """
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ConfigError(f"--pp-layout: got {text!r}, expected the layers of each stage such as 3,5")
        return tuple(int(part) for part in parts)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that parallel axes divide; `vocab_size` counts the rows with padding."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    hidden_size: int
    ffn_hidden_size: int
    vocab_size: int
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_size: int = 0
    moe_router_topk: int = 0


def check_layout(
    layout: ParallelLayout,
    shape: ModelShape | None,
    *,
    world_size: int,
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    overlap_p2p: bool = False,
) -> None:
    """Check a layout against the ranks, the model and the batch; what is None is not checked.

    Args:
        layout: the parallel sizes.
        shape: the model's sizes.
        world_size: number of ranks.
        seq_length: tokens per sample.
        micro_batch_size: samples per forward pass of a data-parallel rank; given for training only.
        global_batch_size: samples per optimizer step.
        overlap_p2p: Megatron's overlap_p2p_comm.

    Raises:
        ConfigError: lists every violation with the nearest valid values.
    """
    problems = list(_positive_problems(layout, world_size, seq_length, micro_batch_size, global_batch_size))
    if not problems:  # the rules below divide by these
        problems += _world_problems(layout, world_size)
        problems += _schedule_problems(layout, overlap_p2p)
        if shape is not None:
            problems += _model_problems(layout, shape, training=micro_batch_size is not None)
            problems += _expert_problems(layout, shape)
            problems += _pipeline_problems(layout, shape.num_layers)
        if seq_length is not None:
            problems += _sequence_problems(layout, seq_length)
        problems += _batch_problems(layout, world_size, micro_batch_size, global_batch_size)
    if problems:
        raise _error(problems)


def _error(problems: list[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"parallel layout: {problems[0]}")
    return ConfigError(f"parallel layout: {len(problems)} problems\n" + "\n".join(f"  - {each}" for each in problems))


def _nearest(got: int, valid: Iterable[int]) -> str:
    """Name the valid values next to `got`, below and above."""
    candidates = sorted(set(valid))
    below = [value for value in candidates if value < got][-1:]
    above = [value for value in candidates if value > got][:1]
    return "nearest valid: " + (" or ".join(str(value) for value in below + above) or "none")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _multiples_near(got: int, step: int) -> list[int]:
    return [multiple for multiple in (got // step * step, got // step * step + step) if multiple > 0]


def _not_dividing(name: str, size: int, owner: str, total: int) -> Iterator[str]:
    if total % size:
        yield f"{name}={size} does not divide {owner}={total}; {_nearest(size, _divisors(total))}"


def _positive_problems(
    layout: ParallelLayout,
    world_size: int,
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
) -> Iterator[str]:
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")}
    sizes |= {"world size": world_size, "sequence length": seq_length}
    sizes |= {"micro batch size": micro_batch_size, "global batch size": global_batch_size}
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            yield f"{name}={size!r} is not a positive whole number; nearest valid: 1"


def _world_problems(layout: ParallelLayout, world_size: int) -> Iterator[str]:
    model, step = layout.model_parallel_size, f"tp*pp*cp = {layout.tp}*{layout.pp}*{layout.cp}"
    if world_size % model:
        near = _nearest(world_size, _multiples_near(world_size, model))
        yield f"world size {world_size} is not a multiple of {step} = {model}; {near} ranks"
    elif layout.dp is not None and layout.dp * model != world_size:
        valid = f"nearest valid: dp={world_size // model}"
        yield f"dp={layout.dp} times {step} is {layout.dp * model}, but there are {world_size} ranks; {valid}"
    expert = layout.expert_tensor_parallel_size * layout.ep * layout.pp
    if world_size % expert:
        yield (
            f"world size {world_size} is not a multiple of etp*ep*pp = "
            f"{layout.expert_tensor_parallel_size}*{layout.ep}*{layout.pp} = {expert}; "
            f"{_nearest(world_size, _multiples_near(world_size, expert))} ranks"
        )


def _schedule_problems(layout: ParallelLayout, overlap_p2p: bool) -> Iterator[str]:
    if layout.sequence_parallel and layout.tp == 1:
        yield "sequence_parallel needs tp > 1; nearest valid: tp=2, or sequence_parallel off"
    if layout.vpp > 1 and layout.pp == 1:
        yield f"vpp={layout.vpp} needs pp > 1; nearest valid: pp=2 or vpp=1"
    if layout.vpp > 1 and layout.pp == 2 and not overlap_p2p:
        # Previous and next rank are the same one, and batched sends pair up in the wrong order.
        valid = "nearest valid: overlap_p2p on, or pp=4, or vpp=1"
        yield f"pp=2 with vpp={layout.vpp} trains wrongly, in silence, without overlap_p2p; {valid}"
    if layout.vpp == 1 and layout.pp > 1 and overlap_p2p:
        yield "overlap_p2p needs the interleaved schedule; nearest valid: vpp=2, or overlap_p2p off"


def _model_problems(layout: ParallelLayout, shape: ModelShape, *, training: bool) -> Iterator[str]:
    tp, groups = layout.tp, shape.num_query_groups
    yield from _not_dividing("tp", tp, "num_attention_heads", shape.num_attention_heads)
    if groups % tp and tp % groups:
        near = _nearest(tp, [*_divisors(groups), *_multiples_near(tp, groups)])
        yield f"tp={tp} neither divides num_query_groups={groups} nor is a multiple of it; {near}"
    if shape.num_attention_heads % groups:
        yield (
            f"num_query_groups={groups} does not divide num_attention_heads={shape.num_attention_heads}; "
            f"{_nearest(groups, _divisors(shape.num_attention_heads))}"
        )
    head_dim = shape.hidden_size // shape.num_attention_heads
    qkv_rows = (shape.num_attention_heads + 2 * groups) * head_dim
    if groups < tp and tp % groups == 0:  # the groups are shared out as rows of the fused projection, then gathered
        yield from _not_dividing("tp", tp, "rows of the query-key-value projection", qkv_rows)
    if shape.hidden_size % shape.num_attention_heads:
        near = _nearest(shape.num_attention_heads, _divisors(shape.hidden_size))
        yield f"num_attention_heads={shape.num_attention_heads} does not divide hidden_size={shape.hidden_size}; {near}"
    yield from _not_dividing("tp", tp, "ffn_hidden_size", shape.ffn_hidden_size)
    yield from _not_dividing("tp", tp, "vocab_size (padded)", shape.vocab_size)
    if shape.num_experts and tp > 1 and not layout.sequence_parallel and training:
        valid = "nearest valid: sequence_parallel on, or tp=1"
        yield f"training a mixture of experts with tp={tp} needs sequence_parallel; {valid}"


def _expert_problems(layout: ParallelLayout, shape: ModelShape) -> Iterator[str]:
    if not shape.num_experts:
        if layout.ep > 1:
            yield f"ep={layout.ep} needs a mixture of experts; nearest valid: ep=1"
        return
    yield from _not_dividing("ep", layout.ep, "num_experts", shape.num_experts)
    yield from _not_dividing(
        "etp", layout.expert_tensor_parallel_size, "moe_ffn_hidden_size", shape.moe_ffn_hidden_size
    )
    if shape.moe_shared_expert_size:
        yield from _not_dividing("tp", layout.tp, "moe_shared_expert_size", shape.moe_shared_expert_size)
    if not 1 <= shape.moe_router_topk <= shape.num_experts:
        near = min(max(shape.moe_router_topk, 1), shape.num_experts)
        yield (
            f"moe_router_topk={shape.moe_router_topk} is not within 1..num_experts={shape.num_experts}; "
            f"nearest valid: {near}"
        )


def _pipeline_problems(layout: ParallelLayout, num_layers: int) -> Iterator[str]:
    stages = layout.pp * layout.vpp
    if layout.pp_layout is None:
        if num_layers % stages:
            yield (
                f"pp*vpp = {layout.pp}*{layout.vpp} = {stages} stages do not divide num_layers={num_layers}; "
                f"{_nearest(stages, _divisors(num_layers))} stages{_uneven_advice(num_layers, stages)}"
            )
        return
    if len(layout.pp_layout) != stages:
        wanted = f"pp*vpp = {layout.pp}*{layout.vpp} = {stages}"
        yield f"pp_layout has {len(layout.pp_layout)} stages, but {wanted}{_uneven_advice(num_layers, stages)}"
    if any(layers < 1 for layers in layout.pp_layout):
        yield f"pp_layout={_comma(layout.pp_layout)} has a stage without layers; nearest valid: at least 1 each"
    if sum(layout.pp_layout) != num_layers:
        total = f"sums to {sum(layout.pp_layout)}, but num_layers={num_layers}"
        yield f"pp_layout={_comma(layout.pp_layout)} {total}{_uneven_advice(num_layers, stages)}"


def _comma(stages: Iterable[int]) -> str:
    return ",".join(str(layers) for layers in stages)


def _uneven_advice(num_layers: int, stages: int) -> str:
    if num_layers < stages:
        return ""
    # The last stages also hold the loss, so the first ones take the remainder.
    short, longer = divmod(num_layers, stages)
    return f"; or pp_layout {_comma([short + 1] * longer + [short] * (stages - longer))}"


def _sequence_problems(layout: ParallelLayout, seq_length: int) -> Iterator[str]:
    reasons = {
        "2*cp": 2 * layout.cp if layout.cp > 1 else 1,
        "cp*tp": layout.cp * layout.tp if layout.sequence_parallel else 1,
    }
    step = math.lcm(*reasons.values())
    if seq_length % step:
        broken = " and of ".join(f"{name} = {factor}" for name, factor in reasons.items() if seq_length % factor)
        near = _nearest(seq_length, _multiples_near(seq_length, step))
        yield f"sequence length {seq_length} is not a multiple of {broken}; {near}"


def _batch_problems(
    layout: ParallelLayout, world_size: int, micro_batch_size: int | None, global_batch_size: int | None
) -> Iterator[str]:
    if global_batch_size is None or world_size % layout.model_parallel_size:
        return
    dp = world_size // layout.model_parallel_size
    per_pass = (micro_batch_size or 1) * dp
    interleaved = per_pass * (layout.pp if layout.vpp > 1 else 1)
    near = _nearest(global_batch_size, _multiples_near(global_batch_size, interleaved))
    if global_batch_size % per_pass:
        wanted = f"micro batch size * dp = {micro_batch_size or 1}*{dp} = {per_pass}"
        yield f"global batch size {global_batch_size} is not a multiple of {wanted}; {near}"
    elif global_batch_size % interleaved:
        yield (
            f"vpp={layout.vpp} needs a multiple of pp={layout.pp} micro batches per step, global batch size "
            f"{global_batch_size} makes {global_batch_size // per_pass}; {near}"
        )
