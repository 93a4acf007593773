"""Hugging Face folders as outputs: safetensors files laid out as `save_pretrained` does, byte for byte."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from megatron_qwen.checkpoint.inside import check_inside
from megatron_qwen.checkpoint.safetensors_header import INDEX_NAME, SINGLE_NAME
from megatron_qwen.conversion.engine.pieces import BLOCK_BYTES, TensorRows, row_pieces
from megatron_qwen.conversion.formats.hf.source import TORCH_DTYPES
from megatron_qwen.conversion.interfaces import OutputFile, bytes_file, pwrite_all
from megatron_qwen.model.config import QwenConfig

CONFIG_NAME = "config.json"
# Files that travel with the weights, copied byte for byte.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "sparse_attention_config.json",
)
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# The order of safetensors' dtype enumeration; a file holds the largest first.
_RANK = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def hf_output(tensors: Sequence[TensorRows], limit: int, *, block: int = BLOCK_BYTES) -> list[OutputFile]:
    """Return the safetensors files of a model, and the index if there are several.

    Shards, names, index and the order within a file are those of `save_pretrained`; so is the metadata.

    Args:
        tensors: in the model's order (`parameters.hf_file_order`).
        limit: largest number of tensor bytes in one file.
        block: bytes that a piece may hold at once.
    """
    by_name = {tensor.label: tensor for tensor in tensors}
    shards = _fill_shards([(tensor.label, tensor.num_bytes) for tensor in tensors], limit)
    suffixes = [f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else "" for i in range(len(shards))]
    files = [SINGLE_NAME.replace(".safetensors", f"{suffix}.safetensors") for suffix in suffixes]
    outputs = [
        _shard_file(file, [by_name[name] for name in names], block) for file, names in zip(files, shards, strict=True)
    ]
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        metadata = {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.num_bytes for tensor in tensors),
        }
        index = {"metadata": metadata, "weight_map": weight_map}
        outputs.append(bytes_file(INDEX_NAME, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()))
    return outputs


def config_file(config: QwenConfig, folder: str = "") -> OutputFile:
    """Return config.json, in a folder of the output given with a trailing slash."""
    text = json.dumps(config.to_hf(), indent=2, sort_keys=True) + "\n"
    return bytes_file(folder + CONFIG_NAME, text.encode())


def companion_files(places: Iterable[Path], folder: str = "") -> list[OutputFile]:
    """Return tokenizer and generation files, byte for byte, from the first of `places` that exists.

    Raises:
        UnsafeInputError: one is a link out of its folder.
    """
    source = next((place for place in places if place.is_dir()), None)
    names = [name for name in COMPANION_FILES if source and (source / name).is_file()]
    files = []
    for name in names:
        assert source is not None
        check_inside(source, name, source / name)
        files.append(bytes_file(folder + name, (source / name).read_bytes()))
    return files


def _shard_file(name: str, tensors: Sequence[TensorRows], block: int) -> OutputFile:
    order = sorted(tensors, key=lambda tensor: (-_RANK[tensor.dtype], tensor.label))
    header, offsets, end = _header(order)
    pieces = [piece for tensor in order for piece in row_pieces(tensor, len(header) + offsets[tensor.label], block)]

    def skeleton(descriptor: int) -> None:
        pwrite_all(descriptor, header, 0)
        os.ftruncate(descriptor, len(header) + end)

    return OutputFile(name=name, num_bytes=len(header) + end, skeleton=skeleton, pieces=tuple(pieces))


def _header(order: Sequence[TensorRows]) -> tuple[bytes, Mapping[str, int], int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    end = 0
    for tensor in order:
        begin, end = end, end + tensor.num_bytes
        offsets[tensor.label] = begin
        header[tensor.label] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, offsets, end


def _fill_shards(tensors: Sequence[tuple[str, int]], limit: int) -> list[list[str]]:
    """Distribute (name, bytes) as huggingface_hub does: in order, a tensor above the limit in a file of its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, num_bytes in tensors:
        if num_bytes > limit:
            shards.append([name])
            continue
        if used + num_bytes > limit:
            shards.append(current)
            current, used = [], 0
        current.append(name)
        used += num_bytes
    return [*shards, current] if current else shards
