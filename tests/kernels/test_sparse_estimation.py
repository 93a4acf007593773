"""Sparse prefill: estimation of columns and diagonals, budgets in files, and their calibration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import sparse_checks as checks
import torch
from dual_chunk_checks import rotated

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.sparse_attention.arguments import checked_sequence
from megatron_qwen.kernels.sparse_attention.estimation import attention_sums, select
from megatron_qwen.testing.compare import assert_relative

CHUNKS = ops.ChunkLayout.released(40, 7)
LAYOUTS = [CHUNKS, ops.ChunkLayout.paper(8, 3), ops.ChunkLayout.released(400, 7), None]


def critical_pair(chunks: ops.ChunkLayout | None, row: int, column: int) -> tuple[int, int]:
    """Positions of query and key for scoring: a, a + L, a + c, in vLLM's words."""
    if chunks is None:
        return row, column
    length = chunks.chunk_size - chunks.local_size
    behind = row // length - column // length
    return row % length + (0 if behind == 0 else length if behind == 1 else chunks.chunk_size), column % length


def sums_by_pairs(
    q: torch.Tensor, k: torch.Tensor, given: dict[str, Any], last_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[H, K] by column and by distance, pair by pair."""
    rows, length = q.shape[0], k.shape[0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    of_columns, of_distances = (q.new_zeros(q.shape[1], length) for _ in range(2))
    for row in range(max(rows - last_rows, 0), rows):
        position = row + length - rows
        seen = torch.arange(position + 1)
        at = torch.tensor([critical_pair(given["chunks"], position, column) for column in range(position + 1)])
        query = rotated(q[row].expand(len(seen), -1, -1), given["tables"], at[:, 0])
        products = (query * rotated(k[seen], given["tables"], at[:, 1])).sum(-1)
        probabilities = (products * checks.SIZE**-0.5 * given["logit_scale"][row]).softmax(0).t()
        of_columns[:, seen] += probabilities
        of_distances[:, position - seen] += probabilities
    return of_columns, of_distances


@pytest.mark.parametrize("chunks", LAYOUTS)
@pytest.mark.parametrize(("rows", "length", "last_rows"), [(1, 1, 64), (9, 50, 64), (90, 143, 64), (90, 143, 5)])
def test_sums_are_those_of_the_last_rows_at_unclamped_positions(
    chunks: ops.ChunkLayout | None, rows: int, length: int, last_rows: int
) -> None:
    q, k, v = checks.inputs(rows, length, torch.float64)
    given = checks.options(chunks, rows, length, torch.float64)
    request = checked_sequence(q, k, v, keys_rotated=False, softmax_scale=None, **given)
    sums = list(attention_sums(q, k, request, last_rows))
    columns, distances = sums_by_pairs(q, k, given, last_rows)
    assert_relative(torch.stack([each for each, _ in sums]), columns, 1e-12)
    assert_relative(torch.stack([each for _, each in sums]), distances, 1e-12)


def test_a_negative_scale_is_that_of_turned_queries() -> None:
    """Columns and distances that a row lacks have no weight, whatever the sign."""
    q, k, v = checks.inputs(9, 50, torch.float64)
    given = checks.options(CHUNKS, 9, 50, torch.float64)
    found = []
    for heads, scale in ((q, -0.3), (-q, 0.3)):
        request = checked_sequence(heads, k, v, keys_rotated=False, softmax_scale=scale, **given)
        found.append(torch.stack([torch.stack(each) for each in attention_sums(heads, k, request)]))
    assert_relative(*found, 1e-14)


def flat(slashes: torch.Tensor) -> list[int]:
    return [distance for first, last in slashes.tolist() for distance in range(first, last)]


def test_selection_takes_forced_entries_then_the_largest() -> None:
    length = 500
    columns, distances = torch.zeros(length), torch.zeros(length)
    columns[[400, 77, 300]] = torch.tensor([3.0, 2.0, 1.0])
    distances[[450, 120, 333]] = torch.tensor([3.0, 2.0, 1.0])
    kept, slashes = select(columns, distances, ops.HeadBudget(33, 102))
    assert kept.tolist() == [*range(30), 77, 300, 400]
    assert slashes.tolist() == [[0, 100], [120, 121], [450, 451]]
    assert select(columns, distances, ops.HeadBudget(33, 102), 20)[1].tolist() == [[0, 121], [450, 451]]
    # Equal sums: the earlier column, the nearer distance. Of exactly 30 columns vLLM makes 130.
    kept, slashes = select(columns, distances, ops.HeadBudget(30, 60))
    assert kept.tolist() == [*range(128), 300, 400]
    assert flat(slashes) == [*range(60)]
    kept, slashes = select(columns, distances, ops.HeadBudget(1, 1))
    assert kept.tolist() == [*range(30)]
    assert flat(slashes) == [*range(50)]
    kept, slashes = select(columns[:7], distances[:7], ops.HeadBudget(1000, 6096))
    assert kept.tolist() == flat(slashes) == [*range(7)]


def test_estimation_finds_planted_columns_and_diagonals() -> None:
    """Head 0 attends to key 57, head 1 (the same keys) to the key 130 back; heads keep lists of their own."""
    length, planted, back = 300, 57, 130
    q, k = torch.zeros(80, 2, 400), torch.zeros(length, 1, 400)
    k[torch.arange(length), 0, torch.arange(length)] = 1.0
    q[:, 0, planted] = 400.0
    q[torch.arange(80), 1, torch.arange(80) + length - 80 - back] = 400.0
    budgets = [ops.HeadBudget(31, 101), ops.HeadBudget(31, 101)]
    index = ops.estimate_index(q, k, budgets, chunks=None, tables=None)
    assert index.length == length
    assert index.of_head(0)[0].tolist() == [*range(30), planted]
    assert index.of_head(1)[1].tolist() == [[0, 100], [back, back + 1]]
    assert index.of_head(0)[1].tolist() != index.of_head(1)[1].tolist()


def test_budgets_of_everything_keep_everything() -> None:
    q, k, v = checks.inputs(9, 131, torch.float32)
    given = checks.options(CHUNKS, 9, 131, torch.float32)
    index = ops.estimate_index(q, k, [ops.HeadBudget(1, 131)] * 4, **given)
    assert [each.tolist() for each in (index.slashes, index.slash_bounds)] == [[[0, 131]] * 4, [0, 1, 2, 3, 4]]
    output, lse = ops.sparse_prefill_attention(q, k, v, index, **given)
    dense, dense_lse = ops.dual_chunk_attention(q[None], k[None], v[None], **given)
    assert_relative(output, dense[0], 3e-6)
    assert_relative(lse, dense_lse[0], 3e-6)


def test_estimation_names_wrong_arguments() -> None:
    q, k, _ = checks.inputs(90, 143, torch.float32)
    given = checks.options(CHUNKS, 90, 143, torch.float32)
    budgets = [ops.HeadBudget(40, 100)] * 4
    needed = 2 * CHUNKS.chunk_size - CHUNKS.local_size
    short = {**given, "tables": tuple(each[: needed - 1] for each in given["tables"])}
    with pytest.raises(ConfigError, match=f"tables have {needed - 1} positions; expected {needed} or more"):
        ops.estimate_index(q, k, budgets, **short)
    with pytest.raises(ConfigError, match="3 budgets; expected 4"):
        ops.estimate_index(q, k, budgets[:3], **given)
    with pytest.raises(ConfigError, match="last_rows is 0"):
        ops.estimate_index(q, k, budgets, last_rows=0, **given)


def test_recall_is_the_share_of_probability() -> None:
    dense = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 0.0, 5.0]])
    share = torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.5]])
    sparse = torch.where(dense == -torch.inf, -torch.inf, dense + share.log())
    torch.testing.assert_close(ops.attention_recall(sparse, dense), torch.tensor([0.375, 0.5]))
    with pytest.raises(ConfigError, match="expected \\[heads, rows\\]"):
        ops.attention_recall(dense, dense[:1])
    with pytest.raises(ConfigError, match="without a row"):
        ops.attention_recall(dense[:, 2:], dense[:, 2:])


def test_refinement_widens_until_the_recall_is_there() -> None:
    rows, length = 70, 300
    q, k, v = checks.inputs(rows, length, torch.float32)
    q[:, 1] *= 0.1  # spread over all keys: this head needs more
    given = checks.options(CHUNKS, rows, length, torch.float32)
    start = [ops.HeadBudget(31, 60, 0.1)] * 4
    before = recalls(start, q, k, v, given)
    middle = float(before.sort().values[1:3].mean())
    for threshold in (middle, 0.97):
        refined = ops.refined_budgets(q, k, start, ops.Refinement(threshold, 16, 24), **given)
        after = recalls(refined, q, k, v, given)
        assert bool((after >= threshold).all())
        torch.testing.assert_close(torch.tensor([each.score for each in refined]), after, rtol=1e-5, atol=0)
        for head, budget in enumerate(refined):
            steps = (budget.verticals - 31) // 16
            assert (budget.verticals, budget.slashes) == (31 + 16 * steps, 60 + 24 * steps)
            assert (steps == 0) == bool(before[head] >= threshold)
            if steps:  # one step less was not enough
                fewer = [*refined]
                fewer[head] = ops.HeadBudget(budget.verticals - 16, budget.slashes - 24)
                assert recalls(fewer, q, k, v, given)[head] < threshold


def test_refinement_ends_with_everything() -> None:
    q, k, _ = checks.inputs(9, 131, torch.float32)
    given = checks.options(CHUNKS, 9, 131, torch.float32)
    refined = ops.refined_budgets(q, k, [ops.HeadBudget(31, 50)] * 4, ops.Refinement(1.0 - 1e-12, 200, 1), **given)
    assert all(budget.verticals == 231 and budget.score > 1.0 - 1e-5 for budget in refined)
    for threshold in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="threshold is"):
            ops.Refinement(threshold)
    with pytest.raises(ConfigError, match="slash_step 0"):
        ops.Refinement(0.9, 1, 0)


def recalls(budgets: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    lse = ops.sparse_prefill_attention(q, k, v, ops.estimate_index(q, k, budgets, **given), **given)[1]
    return ops.attention_recall(lse, ops.dual_chunk_attention(q[None], k[None], v[None], **given)[1][0])


# Two layers of three heads in the published format, with published budgets.
PUBLISHED = [
    {
        "0": ["vertical_and_slash", 1000, 6096, 0.95],
        "1": ["vertical_and_slash", 30, 800, 1.0],
        "2": ["vertical_and_slash", 7244, 12240, 0.463],
    },
    {str(head): ["vertical_and_slash", 3500, 100, 1] for head in range(3)},
]


def test_a_file_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "sparse_attention_config.json"
    path.write_text(json.dumps(PUBLISHED))
    config = ops.SparseAttentionConfig.read(path, num_layers=2, num_heads=3)
    assert config.layers[0][2] == ops.HeadBudget(7244, 12240, 0.463)
    assert config.layers[1] == (ops.HeadBudget(3500, 100, 1),) * 3
    config.write(path)
    assert json.loads(path.read_text()) == PUBLISHED
    assert ops.SparseAttentionConfig.read(path) == config
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    changed = dataclasses.replace(config, layers=config.layers[:1])
    assert changed.to_json() == PUBLISHED[:1]


def test_heads_come_in_the_order_of_their_numbers() -> None:
    heads = {str(head): ["vertical_and_slash", 100 + head, 100, 0.9] for head in reversed(range(12))}
    config = ops.SparseAttentionConfig.from_json([heads])
    assert [each.verticals for each in config.layers[0]] == [*range(100, 112)]


GOOD = ["vertical_and_slash", 100, 100, 0.9]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"0": GOOD}, "expected a list over layers"),
        ([], "no layers or no heads"),
        ([{}], "no layers or no heads"),
        ([{"0": GOOD}, [GOOD]], "layer 1 is"),
        ([{"0": GOOD}, {"0": GOOD, "1": GOOD}], "layer 1 has 2 heads; expected 1"),
        ([{"0": GOOD, "2": GOOD}], "layer 0 has 2 heads.*missing .*1.*not expected .*2"),
        ([{"0": GOOD, "1": GOOD[:3]}], "layer 0, head 1 is"),
        ([{"0": "vert"}], "layer 0, head 0 is"),
        ([{"0": ["block_sparse", 100, 100, 1.0]}], "layer 0, head 0 has pattern 'block_sparse'"),
        ([{"0": ["vertical_and_slash", 0, 100, 1.0]}], "layer 0, head 0: .*verticals is 0"),
        ([{"0": ["vertical_and_slash", 5, True, 1.0]}], "layer 0, head 0: .*slashes is True"),
        ([{"0": ["vertical_and_slash", 5, 1.5, 1.0]}], "layer 0, head 0: .*slashes is 1.5"),
        ([{"0": ["vertical_and_slash", 5, 5, "1"]}], "layer 0, head 0: .*score is '1'"),
        ([{"0": ["vertical_and_slash", 5, 5, float("nan")]}], "layer 0, head 0: .*score is nan"),
    ],
)
def test_wrong_files_are_named_by_layer_and_head(content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"sparse.json: .*{words}"):
        ops.SparseAttentionConfig.read(path)


def test_files_for_another_model_or_no_files() -> None:
    with pytest.raises(ConfigError, match="has 2 layers; expected 28"):
        ops.SparseAttentionConfig.from_json(PUBLISHED, num_layers=28)
    with pytest.raises(ConfigError, match='layer 0 has 3 heads; expected "0" to "3"'):
        ops.SparseAttentionConfig.from_json(PUBLISHED, num_heads=4)


@pytest.mark.parametrize("raw", [b"[", b"\xff\xfe", b'[{"0": 1, "0": 2}]', b"[" * 100_000, None])
def test_damaged_files_are_named(raw: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "sparse.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"sparse\.json: "):
        ops.SparseAttentionConfig.read(path)
