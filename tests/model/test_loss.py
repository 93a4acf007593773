"""The loss without logits is the loss with them: values, every gradient, and what cannot be combined."""

from __future__ import annotations

import loss_ranks
import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.build import build_model
from megatron_qwen.model.loss import resolve_fusion
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.compare import assert_relative
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

FP32, BF16 = torch.float32, torch.bfloat16
ODD, TIED = tiny_dense(layers=1, vocab=511), tiny_dense(layers=1, tied=True, vocab=509)
# As many layers as any model in this process: Megatron sizes its table of auxiliary losses by the first.
MOE = tiny_moe()
# Configuration, dtype, and whether weight gradients add up in Megatron's buffers.
CASES = [(ODD, FP32, False), (ODD, BF16, True), (TIED, FP32, True), (MOE, FP32, True)]
NAMES = ["odd", "odd-bf16-in-place", "tied-in-place", "moe-in-place"]


def check(result: dict[str, tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
    for name, (fused, plain) in result.items():
        assert plain.abs().max() > 0, name
        tolerance = (1e-6 if name == "losses" else 1e-5) if dtype == FP32 else 2e-2
        assert_relative(fused, plain, tolerance, name=name)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_one_rank(case) -> None:
    config, dtype, in_place = case
    check(loss_ranks.both_ways(config, ParallelLayout(), dtype, in_place=in_place), dtype)


@pytest.mark.multirank
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_parallel_ranks(sequence_parallel: bool) -> None:
    cases = CASES if sequence_parallel else CASES[:3]  # Megatron refuses to train a MoE with TP but without SP
    for results in run_ranks(
        loss_ranks.losses_of_layout, 2, cases, ParallelLayout(tp=2, sequence_parallel=sequence_parallel)
    ):
        for (_, dtype, _), result in zip(cases, results, strict=True):
            check(result, dtype)


def test_rows_of_padding_do_not_count() -> None:
    """A model of 500 tokens on 511 rows has the loss of one with 500 rows, with logits and without."""
    for fused in (True, False):
        losses = []
        for size in (500, 511):
            model = build_model(ODD, dtype=FP32, fuse_linear_cross_entropy=fused)
            model.num_tokens = 500
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                model.output_layer.weight[500:] = 3.0
                model.output_layer.weight.data = model.output_layer.weight[:size].clone()
            tokens = torch.randint(0, 500, (2, 16), generator=generator)
            losses.append(model(tokens, torch.arange(16).expand(2, 16), None, labels=tokens))
        torch.testing.assert_close(losses[0], losses[1])


def test_on_by_default_in_16_bits_on_a_cpu() -> None:
    models = [build_model(ODD, dtype=dtype, device="meta") for dtype in (FP32, BF16, torch.float16)]
    assert [model.fuses_linear_cross_entropy for model in models] == [False, True, True]


def test_logits_are_as_before() -> None:
    models = [build_model(ODD, dtype=FP32, fuse_linear_cross_entropy=wanted).eval() for wanted in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.arange(20).view(2, 10)
    logits = [model(tokens, torch.arange(10).expand(2, 10), None) for model in models]
    assert logits[0].shape == (2, 10, 511)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cross_entropy_loss_fusion", True),
        ("config_logger_dir", "somewhere"),
        ("defer_embedding_wgrad_compute", True),
        ("mtp_num_layers", 1),
    ],
)
def test_what_needs_logits_switches_it_off_or_is_refused(name: str, value: object) -> None:
    config = ODD.to_transformer_config(dtype=BF16)
    assert resolve_fusion(config, None)
    setattr(config, name, value)
    assert not resolve_fusion(config, None)
    assert not resolve_fusion(config, False)
    with pytest.raises(ConfigError, match=f"fuse_linear_cross_entropy: got True, but {name} is {value!r}"):
        resolve_fusion(config, True)


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    model = build_model(ODD, dtype=FP32, fuse_linear_cross_entropy=True)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match="labels holds 511"):
        model(tokens, torch.arange(8)[None], None, labels=tokens + 511)
