"""One whole training step, ours and transformers': forward, backward, gradient clipping, AdamW.

Both start from the same Hugging Face folder, read the same tokens, and step with the same
hyper-parameters. Each class is built in a process of its own (see `worker.py`). Alone, ours
starts from Megatron-Core's own random weights: no folder of them is written and read.

What each keeps in bf16: ours, bf16 weights and gradients with fp32 masters and moments, as Megatron-Core
trains; `transformers`, fp32 weights under bf16 autocast, as its Trainer's `bf16=True` does;
`transformers-bf16`, everything in bf16, which is less work and loses small updates.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_qwen.benchmark.breakdown import Breakdown, attribute, record
from megatron_qwen.benchmark.step_ranges import named_ranges

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Batches:
    """Endless batches of random tokens, the same for every contestant.

    Args:
        vocab_size: tokens are drawn from [0, vocab_size).
        micro_batch_size, seq_length: shape of one batch.
    """

    def __init__(self, vocab_size: int, micro_batch_size: int, seq_length: int) -> None:
        self._random = np.random.default_rng(0)
        self._vocab_size = vocab_size
        self._shape = (micro_batch_size, seq_length + 1)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and the tokens that follow them, both int64 [B, S]."""
        text = torch.from_numpy(self._random.integers(0, self._vocab_size, self._shape))
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class MegatronStep:
    """Our training step: the parts that `megatron-qwen train pretrain` puts together, on one rank."""

    def __init__(
        self,
        *,
        folder: str,
        dtype: str,
        seq_length: int,
        micro_batch_size: int,
        flops: float,
        with_weights: bool = True,
        fuse_linear_cross_entropy: bool | None = None,
    ) -> None:
        from megatron_qwen.conversion.loading import load_weights_into
        from megatron_qwen.model.build import build_model_chunks
        from megatron_qwen.model.config import QwenConfig
        from megatron_qwen.parallel import groups
        from megatron_qwen.parallel.device import current_device
        from megatron_qwen.parallel.layout import ParallelLayout
        from megatron_qwen.training.optim import build_optimizer, wrap_chunks
        from megatron_qwen.training.performance import transformer_overrides
        from megatron_qwen.training.recipe import ModelRecipe, OptimizerRecipe, Recipe, ScheduleRecipe
        from megatron_qwen.training.step import TrainStep

        self.amount, self.flops = float(micro_batch_size * seq_length), flops
        recipe = Recipe(
            model=ModelRecipe(source=folder, seq_length=seq_length, dtype=dtype),
            optimizer=OptimizerRecipe(
                lr=LEARNING_RATE,
                beta1=BETAS[0],
                beta2=BETAS[1],
                eps=EPSILON,
                weight_decay=WEIGHT_DECAY,
                clip_grad=CLIP_NORM,
            ),
            schedule=ScheduleRecipe(micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size),
        )
        layout = groups.initialize(ParallelLayout())
        config = QwenConfig.from_hf(folder)
        chunks = build_model_chunks(
            config,
            layout,
            dtype=DTYPES[dtype],
            fuse_linear_cross_entropy=fuse_linear_cross_entropy,
            **transformer_overrides(recipe, config),
        )
        if with_weights:
            load_weights_into(chunks, Path(folder), config)
        wrapped = wrap_chunks(recipe, chunks)
        optimizer = build_optimizer(recipe, wrapped)
        self._step = TrainStep(
            config, wrapped, optimizer, seq_length=seq_length, micro_batch_size=micro_batch_size, num_microbatches=1
        )
        self._batches = Batches(config.vocab_size, micro_batch_size, seq_length)
        self._device = current_device()

    def step(self) -> float:
        """Train on one batch; returns its language-model loss."""
        tokens_BS, targets_BS = self._batches.next()
        microbatch = {
            "tokens": tokens_BS,
            "labels": targets_BS,
            "loss_mask": torch.ones(tokens_BS.shape),
            "position_ids": torch.arange(tokens_BS.size(1)).expand_as(tokens_BS),
        }
        loss = self._step.train([microbatch]).loss
        if self._device.type == "cuda":
            # The loss is known before the update has run; what is left of it would slow the next contestant.
            torch.cuda.synchronize()
        return loss

    def breakdown(self, steps: int, flops: Mapping[str, float]) -> Breakdown:
        """Train on `steps` batches plainly, on one to warm the profiler up and on `steps` recorded."""
        plain = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            plain.append(time.perf_counter() - start)
        with named_ranges(self._step):
            events = record(self.step, steps)
        return attribute(events, flops, plain_seconds=sum(plain) / steps)


class MegatronLogitsStep(MegatronStep):
    """Ours with the logits of all tokens held, as Megatron-Core's own loss holds them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, fuse_linear_cross_entropy=False)


class MegatronFusedStep(MegatronStep):
    """Ours with the loss computed without logits, in every dtype."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, fuse_linear_cross_entropy=True)


class TransformersStep:
    """transformers' model with SDPA attention, and the optimizer its Trainer takes by default (fused AdamW)."""

    def __init__(
        self, *, folder: str, dtype: str, seq_length: int, micro_batch_size: int, flops: float, pure: bool = False
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.amount, self.flops = float(micro_batch_size * seq_length), flops
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stored = DTYPES[dtype] if pure else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=stored, attn_implementation="sdpa")
        self._model.to(self._device).train()
        self._is_moe = self._model.config.model_type == "qwen2_moe"
        self._autocast = dtype != "fp32" and not pure
        self._batches = Batches(self._model.config.vocab_size, micro_batch_size, seq_length)
        decayed = [p for p in self._model.parameters() if p.dim() > 1]
        others = [p for p in self._model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)

    def step(self) -> float:
        """Train on one batch; returns its language-model loss."""
        tokens_BS, targets_BS = (each.to(self._device) for each in self._batches.next())
        options: dict[str, Any] = {"output_router_logits": True} if self._is_moe else {}
        with torch.autocast(self._device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext():
            output = self._model(tokens_BS, labels=tokens_BS, shift_labels=targets_BS, use_cache=False, **options)
        loss = output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._is_moe:
            loss = loss - self._model.config.router_aux_loss_coef * output.aux_loss
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())


class TransformersPureStep(TransformersStep):
    """As TransformersStep, with weights, gradients and moments all in the compute dtype."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, pure=True)
