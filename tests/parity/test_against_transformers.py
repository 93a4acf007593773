from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
import transformers_judge as judge

from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.model.config import YarnScaling
from megatron_qwen.testing.compare import assert_logits_close, assert_relative
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=32)
MODELS = {
    "dense-untied": lambda: tiny_dense(),
    "dense-tied": lambda: tiny_dense(tied=True, heads=6, hidden=96, kv_heads=2),
    "one-kv-head-odd-sizes": lambda: tiny_dense(layers=3, hidden=48, heads=3, kv_heads=1, ffn=70, vocab=131),
    "yarn": lambda: tiny_dense(rope_scaling=YARN, max_position_embeddings=128, rope_theta=1e6),
    "yarn-attention-factor": lambda: tiny_dense(
        rope_scaling=YarnScaling(
            factor=8.0, original_max_position_embeddings=16, attention_factor=1.5, beta_fast=16.0, truncate=False
        )
    ),
    "moe": lambda: tiny_moe(),
    "moe-norm-topk-prob": lambda: tiny_moe(norm_topk_prob=True),
    "moe-mixed-with-dense": lambda: tiny_moe(mlp_only_layers=(0, 2), experts=6, topk=3, kv_heads=4),
    "moe-every-second-layer": lambda: tiny_moe(decoder_sparse_step=2),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every model's folder, with transformers' results in it, and its tokens."""
    cases = {}
    for name, make in MODELS.items():
        folder = write_tiny_hf(tmp_path_factory.mktemp(name), make())
        generator = torch.Generator().manual_seed(1)
        cases[name] = folder, torch.randint(0, make().vocab_size, (2, 67), generator=generator)
    judge.write_references(dict(cases.values()))
    return cases


@pytest.fixture(params=MODELS)
def case(request, references) -> tuple[Path, torch.Tensor]:
    return references[request.param]


def test_fp32_logits_are_those_of_transformers(case):
    folder, tokens = case
    fp32 = judge.reference(folder)
    _, model = judge.build_from(folder)
    assert_logits_close(judge.logits_of(model, tokens), fp32["logits"], 1e-4)


def test_fp32_loss_and_the_gradient_of_every_parameter_are_those_of_transformers(case):
    folder, tokens = case
    fp32 = judge.reference(folder)
    config, model = (
        judge.build_from(folder, moe_aux_loss_coeff=0.0) if "moe" in folder.name else judge.build_from(folder)
    )
    loss = judge.loss_of(model, tokens)
    loss.backward()
    assert_relative(loss, fp32["loss"], 1e-5, name="loss")
    grads = {name.removeprefix("grad."): tensor for name, tensor in fp32.items() if name.startswith("grad.")}
    for name, parameter in model.named_parameters():
        assert_relative(parameter.grad, judge.expected_parameter(name, grads, config), 1e-4, name=name)


def test_bf16_error_is_at_most_one_and_a_half_times_that_of_transformers(case):
    folder, tokens = case
    fp32 = judge.reference(folder)
    theirs = (judge.reference(folder, "bfloat16")["logits"] - fp32["logits"]).abs()
    _, model = judge.build_from(folder, torch.bfloat16)
    ours = (judge.logits_of(model, tokens) - fp32["logits"]).abs()
    assert ours.pow(2).mean().sqrt() <= 1.5 * theirs.pow(2).mean().sqrt()


@pytest.mark.skipif(
    "MEGATRON_QWEN_REAL_CHECKPOINT" not in os.environ, reason="MEGATRON_QWEN_REAL_CHECKPOINT names no folder"
)
def test_real_checkpoint_agrees_with_transformers(tmp_path, capsys):
    source = Path(os.environ["MEGATRON_QWEN_REAL_CHECKPOINT"]).resolve()
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    # Text, not random ids: on those the loss is 13.9 and nothing is well-conditioned.
    text = Path(os.__file__).read_text(encoding="utf-8")
    tokens = torch.tensor(QwenTokenizer.load(source).encode(text)[:256]).view(2, 128)
    judge.write_references({tmp_path: tokens})
    fp32 = judge.reference(tmp_path)
    theirs = (judge.reference(tmp_path, "bfloat16")["logits"] - fp32["logits"]).pow(2).mean().sqrt()
    config, model = judge.build_from(tmp_path)
    fraction = assert_logits_close(judge.logits_of(model, tokens), fp32["logits"], 1e-4)
    # torch's cross-entropy on both sides: over 151,936 rows in fp32 on a CPU it is what errs most, 1.2e-3 off fp64 in
    # the last layer's norm, where Megatron's, which we train with, is 4e-6 off.
    logits_BSV = model.train()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name.removeprefix("grad."): tensor for name, tensor in fp32.items() if name.startswith("grad.")}
    # In the 2-norm: through 24 layers with biases of 145 each side is up to 1e-4 off fp64 in its worst entry.
    expected = {name: judge.expected_parameter(name, grads, config) for name, _ in model.named_parameters()}
    worst = max(
        float((parameter.grad - expected[name]).norm() / expected[name].norm())
        for name, parameter in model.named_parameters()
    )
    assert worst <= 1e-4
    del model, expected
    _, model = judge.build_from(tmp_path, torch.bfloat16)
    ours = (judge.logits_of(model, tokens) - fp32["logits"]).pow(2).mean().sqrt()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(
            f"\nfp32: {fraction:.2e} of the logit range, gradients {worst:.2e}; "
            f"bf16: {ours / theirs:.3f} x transformers; peak {peak:.1f} GiB"
        )
    assert ours <= 1.5 * theirs
