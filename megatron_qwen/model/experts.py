"""Routed experts of the local backend: one GEMM per expert and matrix, everything else over all tokens at once.

Parameters, names and checkpoints are those of Megatron-Core's SequentialMLP; only the computation differs.

Shapes: T tokens of this rank, sorted by expert (a token counts once per expert that it chose), H hidden size,
F an expert's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_qwen.model.swiglu import SwiGLU, is_plain_swiglu
from megatron_qwen.ops import swiglu_backward_


class LocalExperts(SequentialMLP):  # type: ignore[misc]  # megatron-core is untyped
    """SequentialMLP without an autograd graph, an activation and a concatenation per expert.

    On a CPU, a layer of 16 experts (512 tokens, top 4, H 512, F 352, fp32, 2 threads) spends nearly a tenth of a
    training step in those; see docs/benchmarks.md.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the experts' outputs weighted by the router's probabilities.

        Args:
            permuted_local_hidden_states: [T, H], sorted by expert.
            tokens_per_expert: [experts of this rank], integers that sum to T; zero is fine.
            permuted_probs: [T], the router's weight of each row.

        Returns:
            [T, H] in the dtype of the input, and None for the bias that Qwen's experts lack.
        """
        if not self._is_plain():
            result: tuple[Tensor, Tensor | None] = super().forward(
                permuted_local_hidden_states, tokens_per_expert, permuted_probs
            )
            return result
        weights = [expert.linear_fc1.weight for expert in self.local_experts]
        weights += [expert.linear_fc2.weight for expert in self.local_experts]
        output = _GroupedMlp.apply(  # type: ignore[no-untyped-call]
            permuted_local_hidden_states, permuted_probs, tokens_per_expert.tolist(), *weights
        )
        return output, None

    def _is_plain(self) -> bool:
        """Whether nothing is asked for that only Megatron's own forward does."""
        config = self.config
        activation = self.local_experts[0].activation_func
        is_known = isinstance(activation, SwiGLU) or activation is functional.silu
        asks_for_more = config.add_bias_linear or config.moe_apply_probs_on_input or config.fp8 or config.fp4
        return is_known and is_plain_swiglu(config) and not asks_for_more


class _GroupedMlp(torch.autograd.Function):
    """y = (silu(x W1g^T) * (x W1u^T) * p) W2^T with the matrices of each row's expert.

    Keeps x [T, H], x W1^T [T, 2F] and p for backward, and computes the activation again.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, probs_T: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        first, second = weights[: len(counts)], weights[len(counts) :]
        packed = x_TH.new_empty(x_TH.shape[0], first[0].shape[0])
        for rows, weight in zip(_groups(counts), first, strict=True):
            torch.mm(x_TH[rows], weight.t(), out=packed[rows])
        gate, up = packed.chunk(2, dim=-1)
        hidden = _weigh_(functional.silu(gate).mul_(up), probs_T)
        y_TH = x_TH.new_empty(x_TH.shape[0], second[0].shape[0])
        for rows, weight in zip(_groups(counts), second, strict=True):
            torch.mm(hidden[rows], weight.t(), out=y_TH[rows])
        ctx.save_for_backward(x_TH, probs_T, packed, *weights)
        ctx.counts = counts
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, probs_T, packed, *weights = ctx.saved_tensors
        counts = ctx.counts
        first, second = weights[: len(counts)], weights[len(counts) :]
        grad_y = grad_outputs[0].contiguous()
        gate, up = packed.chunk(2, dim=-1)
        silu_gate = functional.silu(gate)
        activated = silu_gate * up
        grad_hidden = torch.empty_like(activated)
        grads = [torch.empty(0)] * len(weights)
        for rows, weight in zip(_groups(counts), second, strict=True):
            torch.mm(grad_y[rows], weight, out=grad_hidden[rows])
        wide = torch.promote_types(probs_T.dtype, activated.dtype)
        grad_probs = torch.linalg.vecdot(grad_hidden.to(wide), activated.to(wide)).to(probs_T.dtype)
        hidden = _weigh_(activated, probs_T)
        for index, (rows, weight) in enumerate(zip(_groups(counts), second, strict=True)):
            grads[len(counts) + index] = _weight_gradient(weight, grad_y[rows], hidden[rows])
        grad_packed = swiglu_backward_(_weigh_(grad_hidden, probs_T), gate, silu_gate, up)
        grad_x = torch.empty_like(x_TH)
        for index, (rows, weight) in enumerate(zip(_groups(counts), first, strict=True)):
            torch.mm(grad_packed[rows], weight, out=grad_x[rows])
            grads[index] = _weight_gradient(weight, grad_packed[rows], x_TH[rows])
        return grad_x, grad_probs, None, *grads


def _groups(counts: Sequence[int]) -> Iterator[slice]:
    """Yield the rows of each expert."""
    end = 0
    for count in counts:
        begin, end = end, end + count
        yield slice(begin, end)


def _weigh_(hidden: Tensor, probs_T: Tensor) -> Tensor:
    """Multiply the rows by their probabilities in place, rounding once to the dtype of `hidden`."""
    return hidden.mul_(probs_T.unsqueeze(-1))


def _weight_gradient(weight: Tensor, grad: Tensor, inputs: Tensor) -> Tensor:
    """Return grad^T inputs, or add it to Megatron's gradient buffer where the parameter has one of its dtype.

    In the second case the result is a placeholder whose content nobody reads: Megatron's hook sees
    `grad_added_to_main_grad`, as it is set by its own fused accumulation.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != grad.dtype or not hasattr(weight, "grad_added_to_main_grad"):
        return grad.t() @ inputs
    buffer.addmm_(grad.t(), inputs)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
