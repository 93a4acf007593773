"""Weight gradients that GEMMs add to Megatron's buffers equal those that are computed apart and added afterwards."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_qwen.model.build import build_model_chunks
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe
from megatron_qwen.training.optim import build_optimizer, wrap_chunks
from megatron_qwen.training.overrides import apply_overrides
from megatron_qwen.training.performance import transformer_overrides
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.step import TrainStep

CONFIGS = {"dense": tiny_dense(layers=2), "tied": tiny_dense(layers=2, tied=True), "moe": tiny_moe(layers=2)}
SEQ_LENGTH = 24


def gradients_and_norm(config, dtype: str, fusion: bool) -> tuple[dict[str, torch.Tensor], float, list[float]]:
    recipe = apply_overrides(
        Recipe(), [f"performance.gradient_accumulation_fusion={str(fusion).lower()}", f"model.dtype={dtype}"]
    )
    layout = groups.initialize(ParallelLayout())
    # Megatron keeps the scale of the last model of this process, whose shape depends on who set it.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    torch.manual_seed(0)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    chunks = build_model_chunks(config, layout, dtype=kind, backend="local", **transformer_overrides(recipe, config))
    assert chunks[0].config.gradient_accumulation_fusion is fusion
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    wrapped = wrap_chunks(recipe, chunks)
    optimizer = build_optimizer(recipe, wrapped)
    step = TrainStep(config, wrapped, optimizer, seq_length=SEQ_LENGTH, micro_batch_size=1, num_microbatches=2)
    text = torch.randint(0, config.vocab_size, (2, 2, 1, SEQ_LENGTH + 1), generator=generator)
    batches = [
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
    results = [step.train(microbatches) for microbatches in batches]
    grads = {name: parameter.main_grad.clone() for name, parameter in wrapped[0].module.named_parameters()}
    return grads, results[0].grad_norm, [result.loss for result in results]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_and_separate_accumulation_agree(name, dtype):
    fused, fused_norm, fused_losses = gradients_and_norm(CONFIGS[name], dtype, True)
    apart, apart_norm, apart_losses = gradients_and_norm(CONFIGS[name], dtype, False)
    tolerance = {"fp32": 2e-6, "bf16": 2e-2}[dtype]
    assert fused_norm == pytest.approx(apart_norm, rel=tolerance)
    assert fused_losses == pytest.approx(apart_losses, rel=tolerance)
    for parameter, expected in apart.items():
        error = (fused[parameter] - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error < 10 * tolerance, (parameter, float(error))
