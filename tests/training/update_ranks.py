"""What the ranks of test_update.py run: the same steps by our short way through the gradients and by Megatron's own."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import leave_layout

SEQ_LENGTH, STEPS, MICROBATCHES = 16, 2, 2
# An Adam that is nearly linear in the gradient: the usual one divides a gradient of rounding errors by its own size.
OPTIMIZER = [
    "performance.gradient_accumulation_fusion=true",
    "optimizer.eps=1e-2",
    "optimizer.lr=1e-2",
    "model.dtype=fp32",
]


def steps_of_layouts(cases: list[tuple[QwenConfig, ParallelLayout, list[str]]]) -> list[dict[str, Any]]:
    """Run `both_ways` for each case on these ranks."""
    return [both_ways(*case) for case in cases]


def both_ways(config: QwenConfig, layout: ParallelLayout, settings: list[str]) -> dict[str, Any]:
    """Return losses, gradient norms, weights and last gradients, as (ours, Megatron's) pairs by name."""
    from megatron_qwen.parallel import groups

    layout = groups.initialize(layout)
    ours, megatrons = (train(config, layout, settings, is_plain=is_plain) for is_plain in (False, True))
    # Another layout over the same process group: quicker than new processes.
    leave_layout()
    return {name: (ours[name], megatrons[name]) for name in ours}


def train(
    config: QwenConfig, layout: ParallelLayout, settings: list[str], *, is_plain: bool
) -> dict[str, torch.Tensor]:
    """Train a few steps.

    `is_plain` leaves Megatron-Core's embedding as it is, lets Megatron-Core divide the gradients by the tokens, and
    clips with its function.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_qwen.model.build import build_model_chunks
    from megatron_qwen.training.optim import build_optimizer, wrap_chunks
    from megatron_qwen.training.overrides import apply_overrides
    from megatron_qwen.training.performance import transformer_overrides
    from megatron_qwen.training.rank import TORCH_DTYPES
    from megatron_qwen.training.recipe import Recipe
    from megatron_qwen.training.step import TrainStep

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    recipe = apply_overrides(Recipe(), [*OPTIMIZER, *settings])
    dtype = TORCH_DTYPES[recipe.model.dtype]
    chunks = build_model_chunks(config, layout, dtype=dtype, **transformer_overrides(recipe, config))
    for name, parameter in chunks[0].named_parameters():
        # By name: tied weights of the first and the last stage begin equal.
        seed = 0 if "embedding" in name or "output_layer" in name else zlib.crc32(name.encode())
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    if is_plain and chunks[0].pre_process:
        restore_embedding(chunks[0])
    wrapped = wrap_chunks(recipe, chunks)
    optimizer = build_optimizer(recipe, wrapped)
    cls = plain_step_class() if is_plain else TrainStep
    step = cls(config, wrapped, optimizer, seq_length=SEQ_LENGTH, micro_batch_size=1, num_microbatches=MICROBATCHES)
    if is_plain:
        from megatron.core.distributed import finalize_model_grads

        chunks[0].config.finalize_model_grads_func = finalize_model_grads
    results = [step.train(batch) for batch in batches(config)]
    return {
        "losses": torch.tensor([each.loss for each in results]),
        "norms": torch.tensor([each.grad_norm for each in results]),
        **{f"weight {name}": p.detach().clone() for name, p in chunks[0].named_parameters()},
        # Those of the last step, as the optimizer holds them: of its shard, if it is distributed.
        **{f"gradient {index}": p.grad.clone() for index, p in enumerate(master_weights(optimizer))},
    }


def master_weights(optimizer: Any) -> list[torch.Tensor]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [p for part in parts for p in part.get_parameters()]


def restore_embedding(model: Any) -> None:
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    from megatron_qwen.model.embedding import AccumulatingEmbedding

    embedding = model.embedding.word_embeddings
    assert type(embedding) is AccumulatingEmbedding
    embedding.__class__ = VocabParallelEmbedding
    embedding.weight.zero_out_wgrad = embedding.is_tied


def plain_step_class() -> type:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    from megatron_qwen.training import step as step_module

    def update(optimizer: Any, grad_norm: float, *, num_tokens: float) -> None:
        del num_tokens  # divided already
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, grad_norm)
        optimizer.step_with_ready_grads()

    class PlainStep(step_module.TrainStep):
        def train(self, microbatches: Any, **options: Any) -> Any:
            # The norm that the step reads is divided by the tokens, as ours is of sums.
            tokens = float(MICROBATCHES * SEQ_LENGTH * data_parallel_size())
            measured, applied = step_module.measure_grad_norm, step_module.apply_update
            step_module.measure_grad_norm = lambda optimizer: tokens_times(measured(optimizer), tokens)
            step_module.apply_update = update
            try:
                return super().train(microbatches, **options)
            finally:
                step_module.measure_grad_norm, step_module.apply_update = measured, applied

    return PlainStep


def tokens_times(norm: float, tokens: float) -> float:
    return norm * tokens


def data_parallel_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


def batches(config: QwenConfig) -> list[list[dict[str, torch.Tensor]]]:
    """Return for every step the micro-batches of this data-parallel rank; tokens repeat, and some ids never occur."""
    from megatron.core import parallel_state

    size = data_parallel_size()
    generator = torch.Generator().manual_seed(1)
    shape = (STEPS, MICROBATCHES, size, 1, SEQ_LENGTH + 1)
    text = torch.randint(0, config.vocab_size // 3, shape, generator=generator)[
        :, :, parallel_state.get_data_parallel_rank()
    ]
    return [
        [
            {
                "tokens": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "loss_mask": torch.ones(1, SEQ_LENGTH),
                "position_ids": torch.arange(SEQ_LENGTH)[None],
            }
            for tokens in microbatches
        ]
        for microbatches in text
    ]
