"""Which samples a rank reads at which step: a function of the step number alone.

Global batch k holds samples [k * G, (k + 1) * G) of the dataset. Micro-batch j of the global batch holds the
next B of them, and data-parallel rank r of D runs micro-batches r, r + D, r + 2D, ... So one rank and many see the
same micro-batches, and a resumed run goes on where the last one stopped, on any number of ranks. Context-parallel ranks
read the same samples, and keep their tokens of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.context import tokens_of_rank

MICROBATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Sizes that fix which sample goes where.

    Attributes:
        global_batch_size: G, samples of a step.
        micro_batch_size: B, samples of a forward pass.
        dp_rank, dp_size: of this rank.
        cp_rank, cp_size: likewise; which tokens of a sample it keeps.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def num_microbatches(self) -> int:
        """Micro-batches this rank runs per step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def microbatch_samples(self, step: int) -> list[list[int]]:
        """Return the sample numbers of each micro-batch of this rank at `step` (from 0)."""
        start = step * self.global_batch_size
        return [
            list(range(first, first + self.micro_batch_size))
            for first in range(
                start + self.dp_rank * self.micro_batch_size,
                start + self.global_batch_size,
                self.dp_size * self.micro_batch_size,
            )
        ]


class _StepSampler(Sampler[list[int]]):
    """Yields the samples of each micro-batch from one step to another, in the order they are run."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self.plan, self.first_step, self.last_step = plan, first_step, last_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            yield from self.plan.microbatch_samples(step)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.num_microbatches


def step_batches(
    dataset: Dataset[dict[str, Any]], plan: BatchPlan, *, first_step: int, last_step: int, num_workers: int = 0
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield the micro-batches of this rank for each step in [first_step, last_step), read ahead by `num_workers`.

    Raises:
        ConfigError: the dataset ends before the last step does.
    """
    available, needed = len(dataset), last_step * plan.global_batch_size  # type: ignore[arg-type]
    if available < needed:
        raise ConfigError(
            f"the dataset has {available:,} samples, steps up to {last_step} need {needed:,} "
            f"(global_batch_size {plan.global_batch_size}); take fewer steps or more data"
        )
    loader = DataLoader(
        dataset,
        batch_sampler=_StepSampler(plan, first_step, last_step),
        collate_fn=partial(stack_samples, cp_rank=plan.cp_rank, cp_size=plan.cp_size),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator, each start of the loader would draw from the global one and move dropout.
        generator=torch.Generator(),
    )
    microbatches = iter(loader)
    for _ in range(first_step, last_step):
        yield [next(microbatches) for _ in range(plan.num_microbatches)]


def stack_samples(samples: Sequence[dict[str, Any]], *, cp_rank: int = 0, cp_size: int = 1) -> dict[str, torch.Tensor]:
    """Stack samples into a micro-batch: each entry [S] becomes [B, S]; of a context-parallel rank, [B, S / cp_size]."""
    whole = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in MICROBATCH_KEYS}
    return {key: tokens_of_rank(each, dim=1, rank=cp_rank, size=cp_size) for key, each in whole.items()}
