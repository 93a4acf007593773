"""Training with Dual Chunk Attention and context parallelism: recipe fields, checkpoints, resume, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.recipes.pretrain import pretrain
from megatron_qwen.testing.ranks import leave_layout, run_ranks
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf
from megatron_qwen.training.batches import BatchPlan, stack_samples, step_batches
from megatron_qwen.training.overrides import apply_overrides
from megatron_qwen.training.rank import check_recipe
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.source import resolve_source, write_hf_folder

CHUNKS = ("model.dca_chunk_size=7", "model.dca_local_size=2", "model.dca_original_length=8")
BLOCK = DualChunkAttention(chunk_size=7, local_size=2, original_max_position_embeddings=8)


def recipe_of(source: str, corpus: Any, out: str, *changes: str) -> Recipe:
    return apply_overrides(
        pretrain(source, ((1.0, corpus.prefix),), out, tokenizer=corpus.tokenizer),
        [
            *("model.dtype=fp32", "model.seq_length=24", "schedule.steps=4", "schedule.micro_batch_size=1"),
            *("schedule.global_batch_size=4", "schedule.warmup_steps=0", "logging.tensorboard=false"),
            *changes,
        ],
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_hf(tmp_path_factory.mktemp("tiny"), tiny_dense(vocab=320, layers=2)))


def losses_of(out: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def train_whole_and_in_parts(whole: Recipe, parts: Recipe, moved: Recipe) -> dict[str, Any]:
    """Train in one go; stopped and resumed; and resumed at another layout. Returns losses and final weights."""
    from megatron_qwen.parallel import groups
    from megatron_qwen.training.loop import train

    train(whole)
    train(parts, stop_at=2)
    if groups.is_rank_zero():
        shutil.copytree(parts.out, moved.out)
    torch.distributed.barrier()
    train(parts)
    leave_layout()
    train(moved)
    return {name: losses_of(recipe.out) for name, recipe in (("whole", whole), ("parts", parts), ("moved", moved))}


@pytest.mark.multirank
def test_a_context_parallel_run_is_resumed_at_its_layout_and_at_another(tiny, corpus, tmp_path):
    runs = [
        recipe_of(tiny, corpus, str(tmp_path / name), *CHUNKS, layout)
        for name, layout in (("whole", "parallel.cp=2"), ("parts", "parallel.cp=2"), ("moved", "parallel.dp=2"))
    ]
    losses = run_ranks(train_whole_and_in_parts, 2, *runs, timeout=300)[0]
    assert len(losses["whole"]) == 4
    assert losses["parts"] == losses["whole"], "bit for bit"
    assert losses["moved"] == pytest.approx(losses["whole"], rel=1e-5)
    for name in ("whole", "moved"):
        config = QwenConfig.from_hf(tmp_path / name / "hf")
        assert config.dual_chunk_attention == BLOCK, "what was trained is what the export says"


def test_the_recipe_puts_chunks_into_the_model_and_takes_them_out(tiny, corpus, tmp_path):
    chunked = resolve_source(recipe_of(tiny, corpus, "run", *CHUNKS, "model.dca_cap=paper"))
    assert chunked.config.dual_chunk_attention == dataclasses.replace(BLOCK, cap="paper")
    short = resolve_source(recipe_of(tiny, corpus, "run", "model.dca_chunk_size=64")).config.dual_chunk_attention
    assert short == DualChunkAttention(chunk_size=64, local_size=4, original_max_position_embeddings=256)
    folder = write_tiny_hf(tmp_path / "chunked", dataclasses.replace(tiny_dense(vocab=320), dual_chunk_attention=BLOCK))
    assert resolve_source(recipe_of(str(folder), corpus, "run")).config.dual_chunk_attention == BLOCK
    plain = resolve_source(recipe_of(str(folder), corpus, "run", "model.dca_chunk_size=0"))
    assert plain.config.dual_chunk_attention is None
    write_hf_folder(plain, tmp_path / "run")
    assert "dual_chunk_attention_config" not in json.loads((tmp_path / "run" / "hf" / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.dca_chunk_size=8", "model.dca_local_size=8"], "dca_local_size: got 8, expected less than"),
        (["model.dca_local_size=8"], "set without dca_chunk_size"),
        (["model.dca_original_length=8"], "set without dca_chunk_size"),
        (["model.dca_chunk_size=-1", "model.dca_local_size=0"], "dca_chunk_size: got -1"),
        ([*CHUNKS, "model.dca_cap=9"], "dca_cap: got '9', expected one of released, paper"),
        (["performance.cp_comm_type=a2a"], "cp_comm_type: got 'a2a', expected one of p2p, all_gather"),
    ],
)
def test_a_bad_field_is_named(changes, message, tiny, corpus):
    with pytest.raises(ConfigError, match=message):
        recipe_of(tiny, corpus, "run", *changes)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        (["parallel.cp=2", "model.seq_length=22"], 2, r"sequence length 22 is not a multiple of 2\*cp = 4"),
        (["parallel.cp=2", "model.attention_dropout=0.1"], 2, "got 0.1; expected 0 with parallel.cp > 1"),
        ([*CHUNKS, "model.attention_dropout=0.1"], 1, "got 0.1; expected 0 with Dual Chunk Attention"),
        ([*CHUNKS, "model.backend=te"], 1, "Transformer Engine has no Dual Chunk Attention"),
        (["model.seq_length=512"], 1, "expected at most that, or Dual Chunk Attention"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(changes, ranks, message, tiny, corpus):
    recipe = recipe_of(tiny, corpus, "run", *changes)
    with pytest.raises(ConfigError, match=message):
        check_recipe(recipe, resolve_source(recipe).config, ranks)


def test_tables_of_yarn_that_megatron_cannot_cut_are_refused(corpus, tmp_path):
    yarn = YarnScaling(factor=2.0, original_max_position_embeddings=32)
    folder = write_tiny_hf(tmp_path / "yarn", dataclasses.replace(tiny_dense(vocab=320), rope_scaling=yarn))
    recipe = recipe_of(str(folder), corpus, "run", "parallel.cp=4")
    check_recipe(recipe, resolve_source(recipe).config, 4)
    recipe = recipe_of(str(folder), corpus, "run", "parallel.cp=3")
    with pytest.raises(ConfigError, match=r"parallel.cp: got 3; expected 2 \* cp to divide .* 32 of this model's YaRN"):
        check_recipe(recipe, resolve_source(recipe).config, 3)


def test_chunks_take_a_model_beyond_its_positions(tiny, corpus):
    recipe = recipe_of(tiny, corpus, "run", *CHUNKS, "model.seq_length=512", "parallel.cp=4")
    check_recipe(recipe, resolve_source(recipe).config, 4)


class Numbered(torch.utils.data.Dataset[dict[str, Any]]):
    """Sample n holds tokens 100 n, 100 n + 1, ..."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.arange(8) + 100 * index
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(8), "position_ids": torch.arange(8)}


def test_context_parallel_ranks_read_the_same_samples_and_keep_their_tokens():
    assert ParallelLayout(cp=2).resolve(4).dp == 2
    batches = {}
    for rank in range(2):
        plan = BatchPlan(global_batch_size=4, micro_batch_size=2, dp_rank=1, dp_size=2, cp_rank=rank, cp_size=2)
        [[batches[rank]]] = list(step_batches(Numbered(), plan, first_step=0, last_step=1))
    assert batches[0]["tokens"].tolist() == [[200, 201, 206, 207], [300, 301, 306, 307]]
    assert batches[1]["tokens"].tolist() == [[202, 203, 204, 205], [302, 303, 304, 305]]
    assert batches[1]["labels"].tolist() == [[203, 204, 205, 206], [303, 304, 305, 306]]
    assert batches[1]["position_ids"].tolist() == [[2, 3, 4, 5]] * 2
    assert batches[0]["loss_mask"].shape == (2, 4)
    assert stack_samples([Numbered()[1]])["tokens"].tolist() == [list(range(100, 108))]
