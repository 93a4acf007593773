"""Compares two checkpoints, each a Hugging Face or a Megatron folder: every tensor to the last bit, or their logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qwen.conversion.loading import load_model, open_source
from megatron_qwen.conversion.parameters import Parameter, parameters
from megatron_qwen.model.config import QwenConfig

# Not part of the function that the model computes, or compared tensor by tensor.
_CONFIG_FIELDS_IGNORED = frozenset({"torch_dtype", "inert_fields"})


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor, or one field of the configuration, that differs.

    Attributes:
        name: Hugging Face name of the tensor, or `config.<field>`.
        kind: "missing in A", "missing in B", "shape", "dtype", "values" or "config".
        detail: what was found on both sides.
        count: number of values whose bits differ.
        max_abs: largest absolute difference of two finite values.
        first: index of the first value that differs.
    """

    name: str
    kind: str
    detail: str
    count: int = 0
    max_abs: float = 0.0
    first: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Outcome of a comparison: `tensors` compared, `weight_bytes` of them on side A, and what differs."""

    a: str
    b: str
    tensors: int
    weight_bytes: int
    differences: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "is_equal": self.is_equal, "differences": [asdict(item) for item in self.differences]}


def verify(a: str | Path, b: str | Path) -> VerifyReport:
    """Compare configuration and every tensor of two folders, bit for bit.

    Args:
        a: a Hugging Face or Megatron folder.
        b: likewise; the kinds may differ.

    Raises:
        InputError, ConfigError: a folder cannot be read; a difference is no error.
    """
    left, right = open_source(a), open_source(b)
    differences = list(_compare_configs(left.config, right.config))
    left_parameters, right_parameters = _by_names(left.config), _by_names(right.config)
    tensors = weight_bytes = 0
    for names in dict.fromkeys((*left_parameters, *right_parameters)):
        if names not in right_parameters or names not in left_parameters:
            side = "B" if names in left_parameters else "A"
            differences += [Difference(name=name, kind=f"missing in {side}", detail="") for name in names]
            continue
        pair = zip(
            names, left.hf_tensors(left_parameters[names]), right.hf_tensors(right_parameters[names]), strict=True
        )
        for name, x, y in pair:
            tensors += 1
            weight_bytes += x.nbytes
            differences += compare_tensors(name, x, y)
    return VerifyReport(a=str(a), b=str(b), tensors=tensors, weight_bytes=weight_bytes, differences=tuple(differences))


def compare_tensors(name: str, a: Tensor, b: Tensor) -> list[Difference]:
    """Return how two tensors differ in shape, dtype or bits; an empty list if they do not."""
    if a.shape != b.shape:
        return [Difference(name=name, kind="shape", detail=f"{tuple(a.shape)} and {tuple(b.shape)}")]
    if a.dtype != b.dtype:
        return [Difference(name=name, kind="dtype", detail=f"{a.dtype} and {b.dtype}")]
    # Bits, not values: -0.0 differs from 0.0, and a NaN equals itself.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    x, y = a.contiguous(), b.contiguous()
    if torch.equal(x.view(bits), y.view(bits)):
        return []
    different = x.view(bits) != y.view(bits)
    gap = (x.double() - y.double()).abs()
    finite = gap[gap.isfinite()]
    first = tuple(int(i) for i in different.nonzero()[0])
    return [
        Difference(
            name=name,
            kind="values",
            detail=f"{x[first].item()} and {y[first].item()} at {first}",
            count=int(different.sum()),
            max_abs=float(finite.max()) if finite.numel() else 0.0,
            first=first,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class LogitsReport:
    """Largest difference of the logits of two checkpoints on the same tokens, and the range of A's logits."""

    a: str
    b: str
    tokens: int
    max_abs: float
    logit_range: float

    @property
    def is_equal(self) -> bool:
        """Whether the logits are equal to the last bit."""
        return self.max_abs == 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "is_equal": self.is_equal}


def compare_logits(a: str | Path, b: str | Path, *, tokens: int = 64, seed: int = 0) -> LogitsReport:
    """Run both models in fp32 on the same random tokens, one after the other, and compare their logits.

    Args:
        a: a Hugging Face or Megatron folder.
        b: likewise.
        tokens: length of the sequence.
        seed: of the tokens.

    Raises:
        InputError, ConfigError: a folder cannot be read.
    """
    vocabulary = min(open_source(folder).config.vocab_size for folder in (a, b))
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(0, vocabulary, (1, tokens), generator=generator)
    logits_a, logits_b = (_logits(folder, ids_BS)[..., :vocabulary] for folder in (a, b))
    return LogitsReport(
        a=str(a),
        b=str(b),
        tokens=tokens,
        max_abs=float((logits_a - logits_b).abs().max()),
        logit_range=float(logits_a.max() - logits_a.min()),
    )


def _logits(folder: str | Path, ids_BS: Tensor) -> Tensor:
    model = load_model(folder, dtype=torch.float32)
    model.eval()
    device = next(model.parameters()).device
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    with torch.inference_mode():
        logits_BSV: Tensor = model(ids_BS.to(device), positions_BS.to(device), None)
    return logits_BSV.float().cpu()


def _by_names(config: QwenConfig) -> Mapping[tuple[str, ...], Parameter]:
    return {parameter.hf_names: parameter for parameter in parameters(config)}


def _compare_configs(a: QwenConfig, b: QwenConfig) -> Iterable[Difference]:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name not in _CONFIG_FIELDS_IGNORED and x != y:
            yield Difference(name=f"config.{field.name}", kind="config", detail=f"{x} and {y}")
