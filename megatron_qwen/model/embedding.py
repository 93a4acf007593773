"""The embedding of a model in training: its gradient goes straight into Megatron's gradient buffer.

Megatron-Core's makes a gradient of V x H, almost all of it zeros, and adds it to the buffer; with tied weights it adds
the zeros of the output layer too. On one thread of an AMD EPYC that is 145 ms a micro-batch with Qwen2.5's vocabulary
and hidden size 512, against 0.1 ms for the rows of the 512 tokens that were read.

Shapes: B samples, S tokens of each, H hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from torch.nn import functional


class AccumulatingEmbedding(tensor_parallel.VocabParallelEmbedding):  # type: ignore[misc]  # megatron-core is untyped
    """`VocabParallelEmbedding` that does for its gradient what `gradient_accumulation_fusion` does for linear layers.

    Attributes:
        is_tied: whether the output layer of this stage has the same weight, and so gives autograd the placeholder
            that stands for the gradients of both.
    """

    is_tied: bool

    @staticmethod
    def adopt(embedding: tensor_parallel.VocabParallelEmbedding, *, is_tied: bool) -> None:
        """Let `embedding` accumulate in place.

        `GPTModel` and its `LanguageModelEmbedding` name this class themselves: there is no spec for it, and a module
        built beside theirs would hold the vocabulary twice and draw other random weights. A class that adds methods
        only can take the place of its base, as in torch.nn.utils.parametrize.
        """
        if type(embedding) is tensor_parallel.VocabParallelEmbedding:
            embedding.__class__ = AccumulatingEmbedding
            embedding.is_tied = is_tied
            if is_tied:
                # Otherwise the output layer returns zeros, for the embedding's gradient to be added to.
                embedding.weight.zero_out_wgrad = False

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Return the rows of the tokens, [B, S, H]; [S / tp, B, H] under sequence parallelism.

        Args:
            input_: token ids, int64 [B, S].
        """
        if not hasattr(self.weight, "main_grad") or getattr(self, "gtp_remat_size", 1) > 1:
            return cast("torch.Tensor", super().forward(input_))
        rows_BS, is_elsewhere_BS = input_, None
        if self.tp_group.size() > 1:
            is_elsewhere_BS = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            # Rows to which zeros are added: different ones, since a row that many tokens share is added up in turn.
            spread = torch.arange(input_.numel(), device=input_.device).view_as(input_) % self.weight.size(0)
            rows_BS = torch.where(is_elsewhere_BS, spread, input_ - self.vocab_start_index)
        output = _Rows.apply(rows_BS, is_elsewhere_BS, self.weight, not self.is_tied)  # type: ignore[no-untyped-call]
        if self.reduce_scatter_embeddings:
            output = output.transpose(0, 1).contiguous()
            return cast(
                "torch.Tensor",
                tensor_parallel.reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group),
            )
        return cast(
            "torch.Tensor", tensor_parallel.reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        )


class _Rows(torch.autograd.Function):
    """Rows of the weight, zero where they are on another rank; the gradient is added to `weight.main_grad`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_BS: torch.Tensor,
        is_elsewhere_BS: torch.Tensor | None,
        weight_VH: torch.Tensor,
        gives_placeholder: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_BS, is_elsewhere_BS, weight_VH)
        ctx.gives_placeholder = gives_placeholder
        output_BSH = functional.embedding(rows_BS, weight_VH)
        return output_BSH if is_elsewhere_BS is None else output_BSH.masked_fill_(is_elsewhere_BS[..., None], 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BSH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_BS, is_elsewhere_BS, weight_VH = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return None, None, None, None
        if is_elsewhere_BS is not None:
            grad_BSH = grad_BSH.masked_fill(is_elsewhere_BS[..., None], 0.0)
        add_rows(weight_VH.main_grad, rows_BS.flatten(), grad_BSH.flatten(0, 1))
        weight_VH.grad_added_to_main_grad = True
        # As Megatron-Core's linear layers do: nobody reads it, but its arrival tells DDP that the gradient is ready.
        return None, None, torch.empty_like(weight_VH) if ctx.gives_placeholder else None, None


def add_rows(buffer_VH: torch.Tensor, rows_N: torch.Tensor, values_NH: torch.Tensor) -> None:
    """Add values to rows of a gradient buffer, deterministically; rows may repeat.

    Args:
        buffer_VH: changed in place. Sums of rows in 16 bits are taken in fp32 first, as the plain embedding's are.
        rows_N: int64.
        values_NH: in any floating dtype.
    """
    if buffer_VH.dtype != torch.float32:
        dense = torch.ops.aten.embedding_dense_backward(values_NH, rows_N, buffer_VH.size(0), -1, False)
        buffer_VH.add_(dense)
    elif buffer_VH.is_cuda:
        # index_add_ would add with atomics; this sorts, so that sums are the same from run to run.
        buffer_VH.index_put_((rows_N,), values_NH.float(), accumulate=True)
    else:
        buffer_VH.index_add_(0, rows_N, values_NH.float())
