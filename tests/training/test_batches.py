"""Which samples come when depends on the step alone, not on ranks or restarts."""

from __future__ import annotations

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.training.batches import BatchPlan, step_batches


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.full((3,), index) for name in ("tokens", "labels", "loss_mask", "position_ids")}


def samples(plan: BatchPlan, first: int, last: int, **options: int) -> list[list[list[int]]]:
    batches = step_batches(Numbers(24), plan, first_step=first, last_step=last, **options)
    return [[microbatch["tokens"][:, 0].tolist() for microbatch in step] for step in batches]


def test_one_rank_sees_every_sample_in_order():
    plan = BatchPlan(global_batch_size=6, micro_batch_size=2)
    assert samples(plan, 0, 2) == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]


def test_data_parallel_ranks_share_the_same_micro_batches():
    alone = samples(BatchPlan(global_batch_size=12, micro_batch_size=2), 0, 2)
    ranks = [
        samples(BatchPlan(global_batch_size=12, micro_batch_size=2, dp_rank=rank, dp_size=3), 0, 2) for rank in range(3)
    ]
    for step in range(2):
        together = [ranks[rank][step][turn] for turn in range(2) for rank in range(3)]
        assert together == alone[step]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restart_goes_on_where_it_stopped(num_workers):
    plan = BatchPlan(global_batch_size=4, micro_batch_size=2)
    assert samples(plan, 2, 6, num_workers=num_workers) == samples(plan, 0, 6)[2:]


def test_reading_leaves_the_global_random_stream_alone():
    before = torch.get_rng_state()
    samples(BatchPlan(global_batch_size=4, micro_batch_size=2), 0, 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_data_is_refused_before_the_first_step():
    with pytest.raises(ConfigError, match=r"24 samples.*need 28"):
        samples(BatchPlan(global_batch_size=4, micro_batch_size=2), 0, 7)
