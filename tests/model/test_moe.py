"""The MoE layer and its router against Megatron-Core's own forward of the same modules."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from megatron_qwen import compat, ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model import router, spec
from megatron_qwen.model.build import build_model
from megatron_qwen.model.experts import LocalExperts
from megatron_qwen.model.moe import QwenMoELayer
from megatron_qwen.model.router import QwenRouter
from megatron_qwen.testing.tiny import tiny_moe

SELECTIVE = {"recompute_granularity": "selective"}
# What the operations do.
OPTIONS = {
    "as it is": {},
    "sequence balance": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "global balance": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    "two balances": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
    },
    "no balance": {"moe_router_load_balancing_type": "none"},
    "z-loss": {"moe_z_loss_coeff": 0.1},
    "per token": {"calculate_per_token_loss": True, "moe_z_loss_coeff": 0.1},
    "fp64 router": {"moe_router_dtype": "fp64"},
    "jitter of nothing": {"moe_input_jitter_eps": 0.0},
    "recompute": {**SELECTIVE, "recompute_modules": ["moe"]},
    "recompute of shared experts": {**SELECTIVE, "recompute_modules": ["shared_experts"]},
    "recompute of activations": {**SELECTIVE, "recompute_modules": ["moe_act"], "moe_grouped_gemm": True},
    "overlap": {"moe_shared_expert_overlap": True},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}
# What is left to Megatron, and a word of the line that says so.
BEYOND = {
    "sinkhorn": ({"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}, "sinkhorn"),
    "sigmoid": ({"moe_router_score_function": "sigmoid"}, "sigmoid"),
    "bias": (
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        "moe_router_enable_expert_bias",
    ),
    "groups": ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "moe_router_num_groups=2"),
    "scaled": ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor=2.5"),
    "capacity": ({"moe_expert_capacity_factor": 0.5}, "moe_expert_capacity_factor=0.5"),
    "padded": (
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        "moe_expert_capacity_factor=1.0",
    ),
}


@pytest.fixture(autouse=True)
def lines(caplog):
    """Each test sees the lines that are logged once."""
    router.say_once.cache_clear()
    caplog.set_level(logging.WARNING, router.__name__)
    return caplog


def layer_of(overrides=None, *, dtype=torch.float32, **fields) -> QwenMoELayer:
    torch.manual_seed(0)
    config = tiny_moe(**{"layers": 1, "experts": 8, "router_aux_loss_coef": 0.1, **fields})
    layer = build_model(config, dtype=dtype, backend="local", **(overrides or {})).decoder.layers[0].mlp
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(8)  # initialised so small that a shared expert's gate has no say
    return layer


@contextlib.contextmanager
def megatrons_forward(layer):
    """The same parameters computed by Megatron's classes."""
    modules = (layer, layer.router, layer.experts)
    before = [type(each) for each in modules]
    assert before == [QwenMoELayer, QwenRouter, LocalExperts]
    try:
        for module, kind in zip(modules, (MoELayer, TopKRouter, SequentialMLP), strict=True):
            module.__class__ = kind
        yield
    finally:
        for module, kind in zip(modules, before, strict=True):
            module.__class__ = kind


def run(layer, x, **arguments):
    """Return output, gradients of x and of every parameter, and the logged losses."""
    if layer.router.global_tokens_per_expert is not None:
        layer.router.reset_global_aux_loss_tracker()
    compat.take_moe_aux_losses()
    x = x.detach().requires_grad_()
    y, bias = layer(x, **arguments)
    assert bias is None
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    layer.zero_grad()
    y.backward(grad)  # Megatron's recompute does not work with autograd.grad
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in (x, *layer.parameters())]
    return y, grads, compat.take_moe_aux_losses()


def assert_as_megatrons(layer, x, **arguments):
    ours, our_grads, our_losses = run(layer, x, **arguments)
    with megatrons_forward(layer):
        theirs, their_grads, their_losses = run(layer, x, **arguments)
    torch.testing.assert_close(our_losses, their_losses, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    for name, mine, other in zip(names, our_grads, their_grads, strict=True):
        assert other.norm() > 0, name
        assert (mine - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize("renormalizes", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_output_gradients_and_losses_equal_megatrons(name, renormalizes):
    layer = layer_of(OPTIONS[name], norm_topk_prob=renormalizes)
    assert layer.in_one_operation
    assert_as_megatrons(layer, torch.randn(13, 3, 64))


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_operations_do_not_do_is_megatrons_and_said_once(name, lines, monkeypatch):
    overrides, word = BEYOND[name]
    monkeypatch.setattr(ops, "moe_routing", None)
    layer = layer_of(overrides)
    assert_as_megatrons(layer, torch.randn(13, 3, 64))
    said = [line for line in lines.messages if "routing is Megatron-Core's own" in line]
    assert len(said) == 1
    assert word in said[0]
    assert sum("not through ops.moe_mlp: its router" in line for line in lines.messages) == 1


def test_nothing_is_said_of_an_ordinary_model(lines):
    layer_of()
    assert not lines.messages


def test_a_padding_mask_is_megatrons_and_said_once(lines):
    layer = layer_of()
    mask = torch.zeros(3, 13, dtype=torch.bool)
    mask[1, 5:] = True
    for _ in range(2):
        assert_as_megatrons(layer, torch.randn(13, 3, 64), padding_mask=mask)
    said = [line for line in lines.messages if "padding mask" in line]
    assert len(said) == 2
    assert "not through ops.moe_mlp" in said[0]
    assert "not ops.moe_routing" in said[1]


def test_one_launch_with_the_shared_experts(monkeypatch):
    layer, calls = layer_of(), []
    original = ops.moe_mlp
    monkeypatch.setattr(ops, "moe_mlp", lambda *args, **options: calls.append(options) or original(*args, **options))
    monkeypatch.setattr(layer.token_dispatcher, "token_dispatch", None)
    layer(torch.randn(5, 1, 64))
    (options,) = calls
    assert options["shared"].gate is layer.shared_experts.gate_weight
    assert not options["recompute"]


@pytest.mark.parametrize("tokens", [1, 2])
def test_experts_without_tokens(tokens):
    layer = layer_of()
    _, grads, _ = run(layer, torch.randn(tokens, 1, 64))
    names = ["input", *(name for name, _ in layer.named_parameters())]
    idle = [name for name, grad in zip(names, grads, strict=True) if not grad.any()]
    assert len(idle) >= 2 * (8 - 2 * tokens)
    assert all(name.startswith("experts.") for name in idle)


def test_a_16_bit_layer_is_as_near_to_fp64_as_megatrons():
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(64, 2, 64).bfloat16()
    ours, our_grads, _ = run(layer, x)
    with megatrons_forward(layer):
        theirs, their_grads, _ = run(layer, x)
    exact, best_grads, _ = run(layer.double(), x.double())
    for mine, other, best in zip((ours, *our_grads), (theirs, *their_grads), (exact, *best_grads), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - best).norm() <= 1.5 * (other.double() - best).norm() + 1e-12


def test_recompute_keeps_no_output_of_the_first_matrices():
    kept = {}
    for name, overrides in (("all", {}), ("recompute", OPTIONS["recompute"])):
        layer, total = layer_of(overrides), []
        own = {each.data_ptr() for each in layer.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, own=own, total=total: total.append(0 if t.data_ptr() in own else t.numel()) or t, lambda t: t
        ):
            layer(torch.randn(64, 1, 64, requires_grad=True))
        kept[name] = sum(total)
    packed, common = 64 * 2 * 2 * 48, 64 * 2 * 96
    assert kept["all"] - kept["recompute"] == packed + common


def test_a_hook_that_brings_parameters_runs_before_they_are_used():
    """As DDP's with overlap_param_gather: every module that owns a parameter, before anything reads it."""
    layer, x = layer_of(), torch.randn(5, 1, 64)
    expected = layer(x)[0]
    owners = [module for module in layer.modules() if any(True for _ in module.parameters(recurse=False))]
    values = {module: [each.detach().clone() for each in module.parameters(recurse=False)] for module in owners}

    def bring(module, *_):
        with torch.no_grad():
            for parameter, value in zip(module.parameters(recurse=False), values[module], strict=True):
                parameter.copy_(value)

    for module in owners:
        module.register_forward_pre_hook(bring)
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(torch.nan)
    assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_a_hook_that_changes_inputs_is_refused(with_kwargs):
    layer = layer_of()
    layer.experts.local_experts[3].linear_fc2.register_forward_pre_hook(
        lambda *_: ((torch.ones(1),), {}), with_kwargs=with_kwargs
    )
    with pytest.raises(ConfigError, match="RowParallelLinear returns inputs"):
        layer(torch.randn(5, 1, 64))


def test_names_and_checkpoint_layout_are_megatrons(monkeypatch):
    ours = build_model(tiny_moe(layers=2), dtype=torch.float32, backend="local")
    theirs_of = {"QwenMoELayer": MoELayer, "QwenRouter": TopKRouter, "LocalExperts": SequentialMLP}
    for name, module in theirs_of.items():
        monkeypatch.setattr(spec, name, module)
    theirs = build_model(tiny_moe(layers=2), dtype=torch.float32, backend="local")
    assert type(theirs.decoder.layers[1].mlp) is MoELayer
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((ours, theirs), (theirs, ours)):
        target.load_state_dict(source.state_dict(), strict=True)
    layouts = [
        {
            name: (each.key, each.global_shape, each.global_offset, each.replica_id)
            for name, each in model.sharded_state_dict().items()
            if hasattr(each, "global_shape")
        }
        for model in (ours, theirs)
    ]
    assert layouts[0] == layouts[1]
    assert any("experts" in name for name in layouts[0])


def test_ready_made_specifications_take_the_layer():
    for moe in (spec.layer_spec(backend="local", num_experts=8), spec._cached_layer_spec("local", 8, False)):
        mlp = moe.submodules.mlp
        assert (mlp.func if hasattr(mlp, "func") else mlp.module) is QwenMoELayer


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment")
def test_the_same_modules_run_on_triton():
    script = Path(__file__).with_name("moe_on_triton.py")
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 2 * (2 + 1 + 2 * 4 + 3)
    assert max(errors) < 1e-5
