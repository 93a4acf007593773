"""CUDA kernels of the grouped MLP run on the CPU (csrc/tests/emulation), through the operation: wgmma by its matrix
descriptors, TMA by its tensor maps, barriers, registers, and everything asynchronous as late as it may happen."""

from __future__ import annotations

import dataclasses

import moe_checks
import pytest
import torch
from emulated_extension import Emulation
from moe_checks import Layer
from op_checks import random, results

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.grouped_mlp import cuda_limits

BF16 = torch.bfloat16
FORWARD = ["moe_row_map", "grouped_up", "grouped_down", "moe_combine"]

# Tiles are 128 rows by 256 columns (two halves of 128 in W1), sums go in steps of 64.
LAYERS = {
    "one token": Layer(tokens=1, experts=3, topk=2, hidden=72, width=40, shared=88),
    "no token": Layer(tokens=0, experts=2, topk=1, hidden=8, width=8, shared=8),
    "empty experts": Layer(tokens=37, experts=9, topk=2, hidden=72, width=40, shared=88, empty=(0, 4, 8)),
    "all on one": Layer(tokens=131, experts=4, topk=1, hidden=8, width=136, empty=(0, 1, 3)),
    "all experts": Layer(tokens=67, experts=2, topk=2, hidden=264, width=64, shared=128, gated=False),
    "wide": Layer(tokens=5, experts=2, topk=1, hidden=136, width=264, shared=520),
}


@pytest.fixture(autouse=True)
def order_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows' order has no CUDA kernel."""
    made = Layer.order.fget
    assert made is not None

    def order(layer: Layer) -> ops.ExpertOrder:
        with ops.use_backend("reference"):
            return made(layer)  # type: ignore[no-any-return]

    monkeypatch.setattr(Layer, "order", property(order))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_results_are_as_exact_as_plain_torch(emulation: Emulation, layer: Layer) -> None:
    moe_checks.check_moe_mlp(layer, BF16, "cuda")
    gate = ["moe_gate"] if layer.shared and layer.gated else []
    assert emulation.calls[: len(gate) + 4] == ([*gate, *FORWARD] if layer.tokens else [])


@pytest.mark.parametrize("name", ["empty experts", "wide"])
def test_half_precision(emulation: Emulation, name: str) -> None:
    moe_checks.check_moe_mlp(LAYERS[name], torch.float16, "cuda")


def test_recomputation_and_rows_in_expert_order(emulation: Emulation) -> None:
    moe_checks.check_moe_mlp(LAYERS["empty experts"], BF16, "cuda", recompute=True)
    assert emulation.calls.count("grouped_up") == 2
    moe_checks.check_grouped_mlp(LAYERS["empty experts"], BF16, "cuda")
    moe_checks.check_grouped_mlp(dataclasses.replace(LAYERS["one token"], topk=1), torch.float16, "cuda")


@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
def test_the_same_bits_for_any_number_of_blocks(emulation: Emulation, multiprocessors: int) -> None:
    layer = Layer(tokens=150, experts=3, topk=2, hidden=72, width=136, shared=136)
    grads = [random((150, 72), BF16, seed=2)]
    emulation.set_multiprocessors(2)
    with ops.use_backend("cuda"):
        once = results(layer.moe_mlp, layer.inputs(BF16), grads)
        emulation.set_multiprocessors(multiprocessors)
        again = results(layer.moe_mlp, layer.inputs(BF16), grads)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_more_rows_than_the_tiles_of_a_band(emulation: Emulation) -> None:
    """16 blocks of 128 rows are neighbours in the list of tiles; here there are 17 of an expert."""
    layer = Layer(tokens=2100, experts=1, topk=1, hidden=8, width=136)
    with ops.use_backend("cuda"):
        y = layer.moe_mlp(*layer.inputs(BF16))
    with ops.use_backend("reference"):
        exact = layer.moe_mlp(*(each.double() for each in layer.inputs(BF16)))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=float(exact.abs().max()) * 2**-7)


def test_no_row_gets_into_another_experts_results(emulation: Emulation) -> None:
    """Blocks of rows end within a group, so those behind belong to another one: here they are NaN."""
    layer = Layer(tokens=9, experts=3, topk=1, hidden=72, width=40)
    x, weights, *matrices = layer.inputs(BF16)
    offsets = torch.tensor([0, 3, 6, 9])
    x[3:6] = float("nan")
    leaves = [each.requires_grad_() for each in (x, weights[:, 0].float(), *matrices)]
    with ops.use_backend("cuda"):
        y = ops.grouped_mlp(leaves[0], leaves[1], offsets, leaves[2].unbind(), leaves[3].unbind())
        grads = torch.autograd.grad(y, leaves, random(y.shape, BF16, seed=2))
    for each in (y, *grads[:2]):
        assert [bool(part.isfinite().all()) for part in each.split(3)] == [True, False, True]
    for each in grads[2:]:
        assert [bool(part.isfinite().all()) for part in each] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_gradients_are_added_to_megatrons_buffers(emulation: Emulation, dtype: torch.dtype) -> None:
    layer = Layer(tokens=19, experts=3, topk=2, hidden=24, width=40, shared=136, empty=(1,))
    x, weights, fc1, fc2, *shared = layer.inputs(BF16)
    groups = [[torch.nn.Parameter(each.clone()) for each in group] for group in (fc1, fc2, shared)]
    parameters = [each for group in groups for each in group]

    def run() -> None:
        with ops.use_backend("cuda"):
            common = ops.SharedExpert(*groups[2])
            ops.moe_mlp(x, weights.float(), layer.order, groups[0], groups[1], shared=common).sum().backward()

    run()
    plain = [each.grad.clone() for each in parameters if each.grad is not None]
    for each in parameters:
        each.main_grad = torch.full_like(each, 3.0, dtype=dtype)
        each.grad_added_to_main_grad = False
    run()
    for each, grad in zip(parameters, plain, strict=True):
        assert each.grad_added_to_main_grad
        tolerance = {torch.float32: 2.0**-8, BF16: 2.0**-7}[dtype]
        torch.testing.assert_close(
            each.main_grad.float(), 3.0 + grad.float(), rtol=tolerance, atol=float(tolerance * grad.abs().max())
        )
        assert torch.equal(each.main_grad == 3.0, grad == 0) or dtype == BF16


def refusal(inputs: list[torch.Tensor], layer: Layer) -> str:
    with ops.use_backend("cuda"), pytest.raises(ConfigError) as error:
        layer.moe_mlp(*inputs)
    return str(error.value)


def test_what_does_not_fit_is_refused_with_the_reason(emulation: Emulation) -> None:
    layer = Layer(tokens=3, experts=2, topk=1, hidden=24, width=16, shared=8)
    assert "takes bfloat16 and float16, not torch.float32" in refusal(layer.inputs(torch.float32), layer)
    narrow = dataclasses.replace(layer, width=20)
    assert "takes multiples of 8, not F = 20" in refusal(narrow.inputs(BF16), narrow)
    odd = dataclasses.replace(layer, shared=4)
    assert "not Fs = 4" in refusal(odd.inputs(BF16), odd)
    many = dataclasses.replace(layer, experts=cuda_limits.MOST_GROUPS)
    assert "takes 192 experts, a shared one included, not 193" in refusal(many.inputs(BF16), many)
    x, *others = layer.inputs(BF16)
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    assert "start at multiples of 16 bytes" in refusal([shifted, *others], layer)
    assert not emulation.calls
    assert emulation.module.most_groups == cuda_limits.MOST_GROUPS


def test_the_extension_checks_sizes_itself(emulation: Emulation) -> None:
    groups = (64, 64, 1, 1, 0, 1, 20, 8, 0)
    with pytest.raises(ValueError, match="grouped_up: size = 20; expected a multiple of 8"):
        emulation.module.grouped_up(groups=groups, x=64, fc1=[64], packed=64, hidden=64, dtype="bfloat16")
    with pytest.raises(ValueError, match="got 2 fc1; expected one per group, 1"):
        emulation.module.grouped_up(groups=groups, x=64, fc1=[64, 64], packed=64, hidden=64, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype is float32; expected bfloat16 or float16"):
        emulation.module.moe_gate(x=64, vector=64, out=64, tokens=1, size=8, dtype="float32")
