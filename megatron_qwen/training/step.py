"""One optimizer step on Megatron-Core's pipeline schedules: losses, gradients, norm, update or refusal.

Legend: B samples of a micro-batch, S tokens of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_qwen import compat
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.device import current_device
from megatron_qwen.training.losses.lm import LossSums, lm_loss
from megatron_qwen.training.optim import apply_update, measure_grad_norm

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

Microbatch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step showed, equal on every rank.

    Attributes:
        loss: mean cross-entropy over the unmasked tokens of the global batch, nats.
        aux_loss: load-balancing loss of a MoE model, without its coefficient, on transformers' scale: top-k times
            the mean over MoE layers and micro-batches, so that perfect balance is top-k; None for a dense model.
        grad_norm: global 2-norm before clipping.
        num_tokens: unmasked tokens of the global batch.
        is_applied: False if loss or gradient was not finite and the weights stayed as they were.
        is_stop_requested: whether any rank was asked to stop (a signal).
    """

    loss: float
    aux_loss: float | None
    grad_norm: float
    num_tokens: int
    is_applied: bool
    is_stop_requested: bool


class TrainStep:
    """The parts of a rank that a step needs: model chunks, optimizer, and the sizes of a batch."""

    def __init__(
        self,
        config: QwenConfig,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        *,
        seq_length: int,
        micro_batch_size: int,
        num_microbatches: int,
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.config = config
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.num_microbatches = num_microbatches
        self._schedule = partial(
            get_forward_backward_func(),
            forward_step_func=_forward_step,
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
        )

    def train(self, microbatches: Sequence[Microbatch], *, is_stop_requested: bool = False) -> StepResult:
        """Run forward and backward over the micro-batches of this rank and update the weights. Collective.

        Args:
            microbatches: `num_microbatches` of them; tokens, labels, loss_mask, position_ids, each [B, S].
            is_stop_requested: whether this rank was asked to stop; the result tells about all of them.
        """
        assert len(microbatches) == self.num_microbatches, (len(microbatches), self.num_microbatches)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(microbatches, self.num_microbatches, forward_only=False)
        norm_of_sums = measure_grad_norm(self.optimizer)
        sums = self._reduce(outputs, norm_of_sums, is_stop_requested)
        loss = sums.loss / sums.tokens if sums.tokens else math.nan
        grad_norm = norm_of_sums / max(sums.tokens, 1.0)
        is_finite = math.isfinite(loss) and not sums.nonfinite_ranks
        if is_finite:
            apply_update(self.optimizer, grad_norm, num_tokens=sums.tokens)
        return StepResult(
            loss=loss,
            aux_loss=sums.aux if self.config.is_moe else None,
            grad_norm=grad_norm,
            num_tokens=int(sums.tokens),
            is_applied=is_finite,
            is_stop_requested=sums.stop_requests > 0,
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Sequence[Microbatch]]) -> float:
        """Return the mean loss (nats per token) over several global batches, dropout off. Collective."""
        for chunk in self.chunks:
            chunk.eval()
        outputs = [sums for batch in batches for sums in self._run(batch, len(batch), forward_only=True)]
        for chunk in self.chunks:
            chunk.train()
        sums = self._reduce(outputs, grad_norm=0.0, is_stop_requested=False)
        return sums.loss / sums.tokens if sums.tokens else math.nan

    def _run(self, microbatches: Sequence[Microbatch], count: int, *, forward_only: bool) -> list[LossSums]:
        # Every virtual stage walks over the same micro-batches, each at its own pace.
        iterators = [iter(microbatches) for _ in self.chunks]
        outputs: list[LossSums] = self._schedule(
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            num_microbatches=count,
            forward_only=forward_only,
        )
        return outputs

    def _reduce(self, outputs: Sequence[LossSums], grad_norm: float, is_stop_requested: bool) -> _GlobalSums:
        """Sum over ranks, in one float64 all-reduce, what every rank needs to know."""
        from megatron.core import parallel_state

        device = current_device()
        local = torch.zeros(5, dtype=torch.float64, device=device)
        if parallel_state.get_tensor_model_parallel_rank() == 0 and outputs:
            local[:2] = torch.stack([torch.stack([each.loss.double(), each.tokens.double()]) for each in outputs]).sum(
                0
            )
        dp_size = parallel_state.get_data_parallel_world_size()
        if self.config.is_moe:
            # Megatron logs each rank's share: split over TP, CP and PP, another over DP, summed over micro-batches.
            moe_layers = sum(self.config.moe_layers())
            scale = self.config.num_experts_per_tok / (moe_layers * self.num_microbatches * dp_size)
            local[2] = compat.take_moe_aux_losses().double().sum() * scale
        local[3] = float(not math.isfinite(grad_norm))
        local[4] = float(is_stop_requested)
        dist.all_reduce(local)
        return _GlobalSums(*local.tolist())


@dataclass(frozen=True)
class _GlobalSums:
    loss: float
    tokens: float
    aux: float
    nonfinite_ranks: float
    stop_requests: float


def _forward_step(data_iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through one chunk, as Megatron's schedules ask for it."""
    from megatron.core.utils import get_attr_wrapped_model

    microbatch = next(data_iterator)
    is_first: bool = get_attr_wrapped_model(model, "pre_process")
    is_last: bool = get_attr_wrapped_model(model, "post_process")
    device = current_device()

    def on_device(name: str, needed: bool) -> torch.Tensor | None:
        return microbatch[name].to(device, non_blocking=True) if needed else None

    output = model(
        on_device("tokens", is_first), on_device("position_ids", is_first), None, labels=on_device("labels", is_last)
    )
    return output, partial(lm_loss, on_device("loss_mask", is_last))
