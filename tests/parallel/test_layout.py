"""Every divisibility rule, against a brute-force oracle and against what Megatron-Core accepts."""

from __future__ import annotations

import itertools

import pytest

from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.layout import ModelShape, ParallelLayout, check_layout

DENSE = ModelShape(
    num_layers=6, num_attention_heads=12, num_query_groups=2, hidden_size=96, ffn_hidden_size=144, vocab_size=384
)
MOE = ModelShape(
    num_layers=6,
    num_attention_heads=12,
    num_query_groups=2,
    hidden_size=96,
    ffn_hidden_size=144,
    vocab_size=384,
    num_experts=6,
    moe_ffn_hidden_size=36,
    moe_shared_expert_size=72,
    moe_router_topk=2,
)


def accepts(layout: ParallelLayout, shape: ModelShape | None = None, **kwargs: object) -> bool:
    try:
        check_layout(layout, shape, **kwargs)  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


def oracle(
    layout: ParallelLayout, shape: ModelShape, world: int, seq: int, micro: int, batch: int, overlap: bool
) -> bool:
    """Hand out heads, rows, layers, experts, tokens and samples one by one: does every rank get the same?"""

    def equal(items: int, bins: int) -> bool:
        shares = [0] * bins
        for item in range(items):
            shares[item % bins] += 1
        return len(set(shares)) == 1

    tp, pp, vpp, ep, cp = layout.tp, layout.pp, layout.vpp, layout.ep, layout.cp
    etp = tp if layout.etp is None else layout.etp
    moe = shape.num_experts > 0
    replicated = shape.num_query_groups < tp
    head_dim = shape.hidden_size // shape.num_attention_heads
    rules = [
        equal(world, tp * pp * cp),
        equal(world, etp * ep * pp),
        equal(shape.num_attention_heads, tp),
        equal(tp, shape.num_query_groups) if replicated else equal(shape.num_query_groups, tp),
        not replicated or equal((shape.num_attention_heads + 2 * shape.num_query_groups) * head_dim, tp),
        equal(shape.ffn_hidden_size, tp),
        equal(shape.vocab_size, tp),
        equal(shape.num_layers, pp * vpp),
        vpp == 1 or pp > 1,
        not (pp == 2 and vpp > 1 and not overlap),
        not (pp > 1 and vpp == 1 and overlap),
        tp > 1 or not layout.sequence_parallel,
        not moe or tp == 1 or layout.sequence_parallel,
        moe or ep == 1,
        not moe
        or (
            equal(shape.num_experts, ep)
            and equal(shape.moe_ffn_hidden_size, etp)
            and equal(shape.moe_shared_expert_size, tp)
        ),
        cp == 1 or equal(seq, 2 * cp),
        not layout.sequence_parallel or equal(seq, cp * tp),
    ]
    if not all(rules):
        return False
    per_step = micro * (world // (tp * pp * cp))
    return equal(batch, per_step) and (vpp == 1 or equal(batch // per_step, pp))


def grid(sizes: tuple[int, ...]):
    for tp, pp, vpp, ep, cp in itertools.product(sizes, (1, 2, 3), (1, 2), (1, 2, 3), (1, 2)):
        for etp, sp in itertools.product((None, 1, 2), (False, True)):
            yield ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep, cp=cp, etp=etp, sequence_parallel=sp)


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_agrees_with_brute_force_on_a_grid(shape: ModelShape) -> None:
    seen = set()
    for layout in grid((1, 2, 3, 4)):
        for world, seq, batch, overlap in (
            (4, 16, 8, True),
            (12, 24, 12, False),
            (12, 18, 6, True),
            (24, 48, 48, True),
        ):
            got = accepts(
                layout,
                shape,
                world_size=world,
                seq_length=seq,
                micro_batch_size=2,
                global_batch_size=batch,
                overlap_p2p=overlap,
            )
            assert got == oracle(layout, shape, world, seq, 2, batch, overlap), (layout, world, seq, batch, overlap)
            seen.add(got)
    assert seen == {True, False}


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_agrees_with_brute_force_everywhere(shape: ModelShape) -> None:
    for layout in grid((1, 2, 3, 4, 5, 6, 8, 12)):
        for world, seq, batch, overlap in itertools.product(
            (1, 2, 3, 4, 6, 8, 12, 24), (16, 18, 24), (4, 6, 12), (False, True)
        ):
            got = accepts(
                layout,
                shape,
                world_size=world,
                seq_length=seq,
                micro_batch_size=1,
                global_batch_size=batch,
                overlap_p2p=overlap,
            )
            assert got == oracle(layout, shape, world, seq, 1, batch, overlap), (layout, world, seq, batch, overlap)


def test_all_violations_come_in_one_message() -> None:
    layout = ParallelLayout(tp=5, pp=4, ep=4, cp=2, vpp=2)
    with pytest.raises(ConfigError) as caught:
        check_layout(layout, MOE, world_size=42, seq_length=18, micro_batch_size=2, global_batch_size=7)
    text = str(caught.value)
    for part in ("num_attention_heads=12", "num_query_groups=2", "ffn_hidden_size=144", "vocab_size (padded)=384"):
        assert part in text
    for part in ("num_experts=6", "num_layers=6", "world size 42", "sequence length 18", "needs sequence_parallel"):
        assert part in text
    assert text.count("nearest valid") >= 9


@pytest.mark.parametrize(
    ("layout", "arguments", "said"),
    [
        (ParallelLayout(tp=5), {"world_size": 5}, "nearest valid: 4 or 6"),
        (ParallelLayout(pp=4), {"world_size": 4}, "nearest valid: 3 or 6 stages; or pp_layout 2,2,1,1"),
        (ParallelLayout(pp=2, pp_layout=(4, 3)), {"world_size": 2}, "sums to 7, but num_layers=6; or pp_layout 3,3"),
        (ParallelLayout(pp=2, pp_layout=(6,)), {"world_size": 2}, "has 1 stages, but pp*vpp = 2*1 = 2"),
        (ParallelLayout(pp=2, pp_layout=(6, 0)), {"world_size": 2}, "a stage without layers"),
        (ParallelLayout(tp=4), {"world_size": 6}, "nearest valid: 4 or 8 ranks"),
        (ParallelLayout(tp=2, dp=3), {"world_size": 4}, "nearest valid: dp=2"),
        (ParallelLayout(cp=2), {"world_size": 2, "seq_length": 30}, "nearest valid: 28 or 32"),
        (ParallelLayout(tp=2, sequence_parallel=True), {"world_size": 2, "seq_length": 31}, "nearest valid: 30 or 32"),
        (
            ParallelLayout(),
            {"world_size": 4, "micro_batch_size": 3, "global_batch_size": 32},
            "nearest valid: 24 or 36",
        ),
        (ParallelLayout(pp=2, vpp=3), {"world_size": 2}, "trains wrongly, in silence"),
        (
            ParallelLayout(pp=3, vpp=2),
            {"world_size": 3, "micro_batch_size": 1, "global_batch_size": 4},
            "multiple of pp=3 micro batches",
        ),
        (ParallelLayout(sequence_parallel=True), {"world_size": 1}, "sequence_parallel needs tp > 1"),
        (ParallelLayout(ep=2), {"world_size": 2}, "ep=2 needs a mixture of experts"),
        (ParallelLayout(tp=0), {"world_size": 1}, "tp=0 is not a positive whole number"),
        (ParallelLayout(pp=True), {"world_size": 1}, "pp=True is not a positive whole number"),
        (ParallelLayout(), {"world_size": 0}, "world size=0"),
    ],
)
def test_names_the_rule_and_the_nearest_valid_values(
    layout: ParallelLayout, arguments: dict[str, int], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(layout, DENSE, **arguments)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_more_experts_per_token_than_experts() -> None:
    import dataclasses

    with pytest.raises(ConfigError, match=r"moe_router_topk=9 is not within 1\.\.num_experts=6; nearest valid: 6"):
        check_layout(ParallelLayout(), dataclasses.replace(MOE, moe_router_topk=9), world_size=1)


def test_generation_may_use_tensor_parallel_experts_without_sequence_parallel() -> None:
    layout = ParallelLayout(tp=2)
    assert accepts(layout, MOE, world_size=2)
    assert not accepts(layout, MOE, world_size=2, micro_batch_size=1)


def test_resolve_fills_in_the_data_parallel_size() -> None:
    assert ParallelLayout(tp=2, pp=3).resolve(24).dp == 4
    with pytest.raises(ConfigError, match="world size 7"):
        ParallelLayout(tp=2).resolve(7)


def test_layers_per_stage() -> None:
    assert ParallelLayout(pp=2, vpp=2).layers_per_stage(8) == (2, 2, 2, 2)
    assert ParallelLayout(pp=3, pp_layout=(3, 3, 1)).layers_per_stage(7) == (3, 3, 1)
    with pytest.raises(ConfigError):
        ParallelLayout(pp=3).layers_per_stage(7)


@pytest.mark.parametrize("text", ["", "3,", "a,b", "3;5", "-1,4"])
def test_refuses_a_pp_layout_that_is_no_list_of_counts(text: str) -> None:
    with pytest.raises(ConfigError, match="--pp-layout"):
        ParallelLayout.parse_pp_layout(text)


def test_reads_a_pp_layout() -> None:
    assert ParallelLayout.parse_pp_layout("3, 5") == (3, 5)


def test_megatron_takes_every_layout_that_passes() -> None:
    """Whatever the checks let through, uneven stages included, builds a TransformerConfig."""
    from megatron.core.transformer import TransformerConfig

    layouts = [
        ParallelLayout(tp=tp, pp=pp, vpp=vpp)
        for tp, pp, vpp in itertools.product((1, 2, 3, 4, 5, 6), (1, 2, 3, 4), (1, 2))
    ]
    layouts += [ParallelLayout(pp=2, pp_layout=(4, 2)), ParallelLayout(pp=2, vpp=2, pp_layout=(1, 2, 2, 1))]
    passed = 0
    for layout in layouts:
        if not accepts(layout, DENSE, world_size=layout.tp * layout.pp, overlap_p2p=layout.vpp > 1):
            continue
        config = TransformerConfig(
            num_layers=6,
            hidden_size=96,
            num_attention_heads=12,
            num_query_groups=2,
            ffn_hidden_size=144,
            pipeline_dtype="float32",
            moe_token_dispatcher_type="alltoall",
            **layout.transformer_config_fields(6),
        )
        assert (config.virtual_pipeline_model_parallel_size or 1) == layout.vpp
        passed += 1
    assert passed >= 10
