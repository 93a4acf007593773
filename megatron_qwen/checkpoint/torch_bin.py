"""Hugging Face folders with pickled weights, `pytorch_model.bin`: headers read as plain data, under the same checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwen.checkpoint.safetensors_header import TensorEntry, WeightFiles
from megatron_qwen.checkpoint.torch_file import locate, open_torch_file
from megatron_qwen.errors import CorruptInputError

_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def read_bin_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file that torch.save wrote, by name.

    Raises:
        IncompleteInputError: there is no such file.
        UnsafeInputError: it asks for more than plain data and tensors.
        CorruptInputError: it is no file of torch.save, or no dict of tensors.
    """
    content = open_torch_file(path)
    if not isinstance(content, dict):
        raise CorruptInputError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return {name: _entry(path, name, tensor) for name, tensor in content.items()}


def _entry(path: Path, name: object, tensor: object) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CorruptInputError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a tensor with a name")
    place = locate(path, tensor, name)
    if tensor.dtype not in _DTYPES:
        raise CorruptInputError(f"{path}: {name}: dtype {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    if not tensor.is_contiguous():
        raise CorruptInputError(f"{path}: {name} is not contiguous; save the model as safetensors")
    return TensorEntry(
        name, path, _DTYPES[tensor.dtype], place.shape, place.offset, place.offset + tensor.numel() * tensor.itemsize
    )


PICKLED = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json", read_bin_header)
