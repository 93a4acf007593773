"""What a training step will need, said before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.model.parameters import count_parameters

# Bytes per parameter. Ours: weight, fp32 gradient, two fp32 moments, and in bf16 an fp32 master weight.
# transformers: fp32 weight, gradient and moments, under autocast too; "pure" keeps all four in bf16.
_STATE_BYTES = {
    ("megatron_qwen", "fp32"): 16,
    ("megatron_qwen", "bf16"): 18,
    ("megatron_qwen-logits", "fp32"): 16,
    ("megatron_qwen-logits", "bf16"): 18,
    ("megatron_qwen-fused", "fp32"): 16,
    ("megatron_qwen-fused", "bf16"): 18,
    ("transformers", "fp32"): 16,
    ("transformers", "bf16"): 16,
    ("transformers-bf16", "fp32"): 16,
    ("transformers-bf16", "bf16"): 8,
}
_DTYPE_BYTES = {"fp32": 4, "bf16": 2}
# Interpreter and libraries; on a GPU its context.
_PROCESS_BYTES = 600e6
# Logits at a time of the loss without logits (kernels/linear_cross_entropy).
_CHUNK_NUMBERS = {"cpu": 2**21, "cuda": 2**27}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one contestant needs, in bytes.

    Attributes:
        states: weights, gradients, master weights, moments: exact.
        activations: what forward keeps for backward, roughly.
        logits: of all tokens, with what the loss and its backward make of them, roughly.
    """

    states: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """With the process itself."""
        return self.states + self.activations + self.logits + _PROCESS_BYTES


def demand(config: QwenConfig, *, dtype: str, tokens: int, contestant: str = "megatron_qwen") -> Demand:
    """Estimate the peak memory of training steps on one device.

    Args:
        config: the model.
        dtype: "fp32" or "bf16".
        tokens: per step, all held at once.
        contestant: of the case "train".
    """
    size = _DTYPE_BYTES[dtype]
    hidden = config.hidden_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    mlp = config.intermediate_size
    if config.is_moe:
        mlp = config.moe_intermediate_size * config.num_experts_per_tok + config.shared_expert_intermediate_size
    # Per layer and token: inputs of two norms and four matrices, q, k, v before and after rotation, gate, up, product.
    per_layer = size * (6 * hidden + 3 * qkv + 3 * mlp)
    parameters = count_parameters(config).total
    return Demand(
        states=float(parameters * _STATE_BYTES[contestant, dtype]),
        activations=float(config.num_hidden_layers * tokens * per_layer),
        logits=_logits_bytes(config, dtype, tokens, contestant),
    )


def _logits_bytes(config: QwenConfig, dtype: str, tokens: int, contestant: str) -> float:
    """Of what the loss makes; see `Demand`."""
    import torch

    size, vocabulary = _DTYPE_BYTES[dtype], config.vocab_size
    # As `model.loss.resolve_fusion` decides.
    by_default = dtype == "bf16" and not torch.cuda.is_available()
    if contestant == "megatron_qwen-fused" or (contestant == "megatron_qwen" and by_default):
        # Some rows of the vocabulary at a time.
        return float(
            min(tokens * vocabulary, _CHUNK_NUMBERS["cuda" if torch.cuda.is_available() else "cpu"]) * (2 * size + 8)
        )
    # The logits and their gradient, and exp(logits) in fp32 beside a copy of them.
    logits = float(tokens * vocabulary * (2 * size + 8))
    # Ours adds the embedding's rows to its gradient buffer (`model.embedding`).
    return logits if contestant.startswith("megatron_qwen") else logits + vocabulary * config.hidden_size * size


def require_memory(
    config: QwenConfig, *, dtype: str, tokens: int, contestants: Sequence[str], available: float, device: str
) -> None:
    """Refuse a run that does not fit, with what would.

    Args:
        config: see `demand`, as for dtype and tokens.
        dtype: "fp32" or "bf16".
        tokens: per step.
        contestants: all of them are there at once.
        available: bytes.
        device: what has them, for the message.

    Raises:
        ConfigError: says what is needed, what is there, and which smaller runs fit.
    """

    def needed(config: QwenConfig, dtype: str, tokens: int) -> list[Demand]:
        return [demand(config, dtype=dtype, tokens=tokens, contestant=each) for each in contestants]

    def fits(config: QwenConfig, dtype: str, tokens: int) -> bool:
        return sum(each.total for each in needed(config, dtype, tokens)) <= available

    if fits(config, dtype, tokens):
        return
    parts = needed(config, dtype, tokens)
    vocabulary = min(config.vocab_size, 32_768)
    other = "bf16" if dtype == "fp32" else "fp32"
    smaller = {
        f"--dtype {other}": (config, other, tokens),
        "fewer tokens (--seq-length, --micro-batch-size)": (config, dtype, max(1, tokens // 8)),
        **{
            f"--layers {layers}": (keep_layers(config, layers), dtype, tokens)
            for layers in _halvings(config.num_hidden_layers)
        },
        f"--vocab-size {vocabulary}": (dataclasses.replace(config, vocab_size=vocabulary), dtype, tokens),
        **{
            f"--layers {layers} --vocab-size {vocabulary}": (
                dataclasses.replace(keep_layers(config, layers), vocab_size=vocabulary),
                dtype,
                tokens,
            )
            for layers in _halvings(config.num_hidden_layers)
        },
    }
    fitting = [option for option, run in smaller.items() if fits(*run)]
    states, activations, logits, total = (
        sum(getattr(each, name) for each in parts) for name in ("states", "activations", "logits", "total")
    )
    raise ConfigError(
        f"memory: {count_parameters(config).total:,} parameters in {dtype} need about {_gb(total)} "
        f"({' + '.join(contestants)}: weights, gradients and optimizer {_gb(states)}, activations {_gb(activations)}, "
        f"logits {_gb(logits)}); {device} has {_gb(available)} free. "
        + (
            f"These fit: {'; '.join(fitting[:3])}. "
            if fitting
            else "Nothing smaller of this model fits; take another. "
        )
        + "--no-memory-check tries anyway."
    )


def keep_layers(config: QwenConfig, layers: int) -> QwenConfig:
    """Return `config` with its first `layers` layers."""
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        mlp_only_layers=tuple(each for each in config.mlp_only_layers if each < layers),
    )


def _halvings(layers: int) -> list[int]:
    halves = []
    while layers > 1:
        layers //= 2
        halves.append(layers)
    return halves


def free_memory() -> tuple[float, str]:
    """Return the bytes that a benchmark can take on its device, and what that is: GPU memory, or this machine's."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]), "the GPU"
    return float(psutil.virtual_memory().available), "this machine"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
