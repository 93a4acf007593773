"""What a user may ask of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.parallel.layout import ParallelLayout

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FORMATS = ("torch_dist", "torch")
IMPLEMENTATIONS = ("local", "transformer_engine")
DEFAULT_SHARD_BYTES = 50 * 10**9  # save_pretrained's


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of `import_hf`, `export_hf` and `reshard`.

    Attributes:
        dtype: cast the weights; None keeps each tensor's dtype.
        overwrite: replace an existing target, unless it holds training steps.
        allow_nonfinite: convert NaN and infinity as they are.
        allow_pickle: open a per-rank Megatron checkpoint, under an allow-list of plain classes.
        verify: read the output again and compare it with the source before it gets its name.
        resume: go on with what an interrupted conversion of the same kind left beside the target.
        progress: show a bar on stderr.
        threads: that write; None takes the processor cores, 2 to 8.
        max_memory: bytes that they may hold together; None for a few slices of 4 MiB each.
        max_shard_bytes: largest number of tensor bytes in one Hugging Face file.
        ckpt_format: of a Megatron target: "torch_dist", or "torch" for per-rank files.
        layout: of per-rank files.
        transformer_impl: of the model that loads per-rank files, which decides the names in them: "local" or
            "transformer_engine". A torch_dist checkpoint loads in both.
        optimizer: carry the optimizer state from one Megatron checkpoint to the other, where there is one.
        distributed_optimizer: write it as the distributed optimizer's; None keeps the kind of the source.

    Raises:
        ConfigError: a value is not one of these.
    """

    dtype: torch.dtype | str | None = None
    overwrite: bool = False
    allow_nonfinite: bool = False
    allow_pickle: bool = False
    verify: bool = False
    resume: bool = False
    progress: bool = True
    threads: int | None = None
    max_memory: int | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ckpt_format: Literal["torch_dist", "torch"] = "torch_dist"
    layout: ParallelLayout | None = None
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    optimizer: bool = True
    distributed_optimizer: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str) and self.dtype not in DTYPES:
            raise ConfigError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.ckpt_format not in FORMATS:
            raise ConfigError(f"ckpt_format: got {self.ckpt_format!r}, expected one of {', '.join(FORMATS)}")
        if self.transformer_impl not in IMPLEMENTATIONS:
            raise ConfigError(
                f"transformer_impl: got {self.transformer_impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.layout is not None and self.ckpt_format != "torch":
            raise ConfigError("a torch_dist checkpoint has no layout: it loads at any; leave out the sizes")
        for name in ("threads", "max_memory", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype asked for."""
        return DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype
