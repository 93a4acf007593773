"""Loss curves of the local backend's MoE modules are those of Megatron-Core's own, in every layout and dispatcher."""

from __future__ import annotations

import moe_curves
import pytest

from megatron_qwen.recipes.pretrain import pretrain
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_moe, write_tiny_hf
from megatron_qwen.training.overrides import apply_overrides
from megatron_qwen.training.recipe import Recipe

RELATIVE = 1e-5
STEPS = 20

SP = "parallel.tp=2 parallel.sequence_parallel=true"
ALLGATHER = "performance.moe_token_dispatcher=allgather"
OVERLAP = "performance.moe_shared_expert_overlap=true"
# Parameters arrive while layers are computed: in buckets so small that each layer has several.
GATHER = "performance.overlap_grad_reduce=true performance.overlap_param_gather=true performance.bucket_size=10000"
RECOMPUTE = "performance.recompute=selective performance.recompute_modules=[moe]"
# Where there is one data-parallel rank: two micro-batches per step, as elsewhere.
TWO_SAMPLES = "schedule.global_batch_size=2"
# ranks -> changes of a recipe; the all-to-all dispatcher where no other is named.
LAYOUTS = {
    2: [
        "",
        "parallel.ep=2",
        f"parallel.ep=2 {ALLGATHER}",
        f"parallel.ep=2 {OVERLAP} {GATHER}",
        f"{SP} parallel.etp=1 {TWO_SAMPLES}",
        ALLGATHER,
    ],
    4: [f"{SP} parallel.ep=2", f"{SP} parallel.ep=2 {ALLGATHER}", "parallel.ep=4", f"parallel.ep=4 {ALLGATHER}"],
}
EXHAUSTIVE = {
    2: [GATHER, f"{SP} parallel.ep=2 parallel.etp=1 {OVERLAP}", f"parallel.ep=2 {RECOMPUTE}"],
    4: [f"{SP} parallel.ep=2 {OVERLAP}", "parallel.ep=2 parallel.pp=2"],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_moe(vocab=320, layers=2, experts=8, router_aux_loss_coef=0.05)
    return str(write_tiny_hf(tmp_path_factory.mktemp("weights") / "moe", config))


@pytest.fixture
def recipe_of(weights, corpus, tmp_path):
    """Return a function: (name of the run, changes) -> recipe."""

    def make(name: str, changes: str) -> Recipe:
        out = str(tmp_path / name)
        return apply_overrides(
            pretrain(weights, ((1.0, corpus.prefix),), out, tokenizer=corpus.tokenizer),
            [
                "model.dtype=fp32",
                "model.seq_length=16",
                f"schedule.steps={STEPS}",
                "schedule.micro_batch_size=1",
                "schedule.global_batch_size=4",
                "schedule.style=constant",
                "schedule.warmup_steps=0",
                "optimizer.lr=3e-4",
                "seed=7",
                "checkpoint.save_at_end=false",
                "logging.tensorboard=false",
                *changes.split(),
            ],
        )

    return make


def check(layouts: list[str], ranks: int, recipe_of) -> None:
    pairs = [
        (recipe_of(f"ours-{index}", changes), recipe_of(f"theirs-{index}", changes))
        for index, changes in enumerate(layouts)
    ]
    results = run_ranks(moe_curves.train_both, ranks, pairs, timeout=400)[0]
    wrong = []
    for changes, (ours, theirs) in zip(layouts, results, strict=True):
        assert len(ours["loss"]) == STEPS
        assert min(ours["aux_loss"]) > 0
        for name, values in ours.items():
            if values != pytest.approx(theirs[name], rel=RELATIVE):
                wrong.append(f"[{changes}] {name}: {values}, Megatron's: {theirs[name]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.multirank
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_curves_are_those_of_megatrons_modules(ranks, recipe_of):
    check(LAYOUTS[ranks], ranks, recipe_of)


@pytest.mark.exhaustive
@pytest.mark.multirank
@pytest.mark.parametrize("ranks", EXHAUSTIVE)
def test_more_layouts_and_switches(ranks, recipe_of):
    check(EXHAUSTIVE[ranks], ranks, recipe_of)
