"""The loss of a `GPTModel`: its output layer and cross-entropy in one operation that never holds the logits.

Also keeps rows that only pad the vocabulary out of the softmax, where Megatron-Core counts them: so the loss does
not depend on the tensor-parallel size that asks for padding.

Shapes: S positions, B samples, H hidden size, V rows of the output layer on this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.embedding import AccumulatingEmbedding
from megatron_qwen.parallel.device import current_device

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class QwenGPTModel(GPTModel):  # type: ignore[misc]  # megatron-core is untyped
    """`GPTModel` with this project's loss; parameters, names and logits are Megatron-Core's own.

    Attributes:
        num_tokens: rows of the vocabulary that are tokens; those behind it are padding.
        fuses_linear_cross_entropy: whether a call with labels computes the loss without logits.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_tokens: int,
        fuse_linear_cross_entropy: bool | None = None,
        **options: Any,
    ) -> None:
        """Build the model.

        Args:
            config: see `GPTModel`.
            num_tokens: entries of the vocabulary without padding.
            fuse_linear_cross_entropy: see `resolve_fusion`.
            options: of `GPTModel`.

        Raises:
            ConfigError: the fused loss is asked for where it cannot be had.
        """
        fuses = resolve_fusion(config, fuse_linear_cross_entropy)
        super().__init__(config=config, **options)
        self.num_tokens = num_tokens
        self.fuses_linear_cross_entropy = fuses
        if self.pre_process and config.gradient_accumulation_fusion:
            is_tied = self.share_embeddings_and_output_weights and self.post_process
            AccumulatingEmbedding.adopt(self.embedding.word_embeddings, is_tied=is_tied)

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        is_plain = labels is None or not self.fuses_linear_cross_entropy or not self.post_process
        if is_plain or options.get("output_processor") is not None:
            result: torch.Tensor = super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, **options
            )
            return result
        assert labels is not None
        return self.compute_fused_loss(hidden_states, labels)

    def compute_fused_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of every token, fp32 [B, S].

        Args:
            hidden_states: of the last layer, [S, B, H]; [S / tp, B, H] with sequence parallelism.
            labels: [B, S].

        Raises:
            ConfigError: a label outside the vocabulary (on a CPU; NaN elsewhere).
        """
        layer = self.output_layer
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else layer.weight
        losses = ops.linear_cross_entropy(
            hidden_states,
            weight,
            labels.transpose(0, 1),
            vocab_size=self.num_tokens,
            group=self.pg_collection.tp,
            sequence_parallel=layer.sequence_parallel,
            weight_gradient=MainGradient(weight) if accumulates_in_place(layer, weight) else None,
        )
        return losses.transpose(0, 1).contiguous()

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of every token, fp32 [B, S], of logits [S, B, V] over this rank's rows."""
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        rows = max(self.num_tokens - first, 0)
        if rows < logits.shape[-1]:
            logits[..., rows:] = -torch.inf
        losses: torch.Tensor = super().compute_language_model_loss(labels, logits)
        return losses


def resolve_fusion(config: TransformerConfig, wanted: bool | None) -> bool:
    """Return whether the loss is computed without logits.

    Args:
        config: of the model.
        wanted: None for on where it is validated, costs no time and nothing speaks against it: in 16 bits on a CPU. In
            fp32 the layer takes 1.3 times as long, as its largest product is taken twice (docs/benchmarks.md); and on a
            GPU its kernels have not run yet. There it must be asked for.

    Raises:
        ConfigError: it is wanted, and something else is that needs the logits.
    """
    obstacles = {
        "defer_embedding_wgrad_compute": config.defer_embedding_wgrad_compute,
        "cross_entropy_loss_fusion": config.cross_entropy_loss_fusion,
        "mtp_num_layers": config.mtp_num_layers,
        "config_logger_dir": config.config_logger_dir,
        "use_mup": getattr(config, "use_mup", False),
        "fp8_output_proj": getattr(config, "fp8_output_proj", False),
    }
    found = [f"{name} is {value!r}" for name, value in obstacles.items() if value]
    if wanted and found:
        raise ConfigError(
            f"fuse_linear_cross_entropy: got True, but {', '.join(found)}, which needs the logits or their gradient; "
            "expected one or the other"
        )
    if wanted is None:
        return not found and current_device().type == "cpu" and config.params_dtype != torch.float32
    return wanted


def accumulates_in_place(layer: Any, weight: torch.Tensor) -> bool:
    """Whether Megatron's `gradient_accumulation_fusion` is on for the output layer, and its buffer is there."""
    return layer.gradient_accumulation_fusion and hasattr(weight, "main_grad")


class MainGradient:
    """Adds the gradient of a weight to Megatron's gradient buffer, chunk by chunk, as its output layer does."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def add(self, rows: slice, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add grad_logits^T hidden to these rows; see `ops.WeightGradient`."""
        buffer = self._weight.main_grad[rows]  # type: ignore[attr-defined]
        kernels = layers.fused_weight_gradient_mlp_cuda
        if buffer.dtype == torch.float32:
            kernels.wgrad_gemm_accum_fp32(hidden, grad_logits, buffer)
        else:
            kernels.wgrad_gemm_accum_fp16(hidden, grad_logits, buffer)

    def result(self) -> torch.Tensor | None:
        """Return a placeholder that nobody reads, or None where the embedding, to which it is tied, gives a gradient.

        Megatron-Core's layer returns zeros there, which are added to the embedding's gradient: a tensor of V x H, and
        a pass over it.
        """
        weight = self._weight
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        # Set by Megatron-Core for a weight that serves as embedding and as output layer of one stage.
        return None if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
