"""The tensor rearrangements between Hugging Face and Megatron, each with its inverse beside it.

Pure functions of tensors and integers. They work on a whole parameter and equally on one tensor-parallel shard of
it: a shard of the sources gives the shard of the result, with `num_groups` counting the shard's groups.

Size letters: G query groups (key/value heads), Q query heads per group, D head size, F MLP width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qwen.errors import MismatchError


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """The integers that the QKV rearrangement needs.

    Attributes:
        num_groups: query groups in the tensor at hand.
        head_dim: size of one head.
    """

    num_groups: int
    head_dim: int


def interleave_qkv(sources: Sequence[Tensor], sizes: HeadSizes) -> Tensor:
    """Merge q [G*Q*D, ...], k [G*D, ...], v [G*D, ...] to Megatron's [G*(Q+2)*D, ...]: per group its queries, k and v.

    Works for weights (trailing H) and biases (no trailing axis). Layout: `SelfAttention.get_query_key_value_tensors`.
    """
    groups = [source.reshape(sizes.num_groups, -1, *source.shape[1:]) for source in sources]
    return torch.cat(groups, dim=1).flatten(0, 1)


def split_qkv(merged: Tensor, sizes: HeadSizes) -> tuple[Tensor, ...]:
    """Inverse of `interleave_qkv`: (q, k, v)."""
    grouped = merged.reshape(sizes.num_groups, -1, *merged.shape[1:])
    rows = grouped.shape[1] - 2 * sizes.head_dim
    parts = torch.split(grouped, [rows, sizes.head_dim, sizes.head_dim], dim=1)
    return tuple(part.flatten(0, 1) for part in parts)


def concat_gate_up(sources: Sequence[Tensor], _: HeadSizes) -> Tensor:
    """Merge gate [F, H] and up [F, H] to Megatron's linear_fc1 [2F, H], gate first."""
    return torch.cat(tuple(sources), dim=0)


def split_gate_up(merged: Tensor, _: HeadSizes) -> tuple[Tensor, ...]:
    """Inverse of `concat_gate_up`: (gate, up)."""
    return tuple(merged.chunk(2, dim=0))


def keep(sources: Sequence[Tensor], _: HeadSizes) -> Tensor:
    """Return the only source, unchanged."""
    (source,) = sources
    return source


def keep_back(merged: Tensor, _: HeadSizes) -> tuple[Tensor, ...]:
    """Inverse of `keep`."""
    return (merged,)


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Append zero rows up to `rows`; the tensor itself where it has as many."""
    if tensor.shape[0] == rows:
        return tensor
    assert tensor.shape[0] < rows, (tuple(tensor.shape), rows)
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    return padded


def unpad_rows(tensor: Tensor, rows: int, name: str, first: int = 0) -> Tensor:
    """Inverse of `pad_rows`, for rows from number `first` on.

    Raises:
        MismatchError: a row that is dropped is not zero, so it is no padding.
    """
    surplus = tensor[rows:]
    if torch.count_nonzero(surplus):
        bad = first + rows + int(surplus.flatten(1).any(dim=1).nonzero()[0])
        size, total = first + rows, first + tensor.shape[0]
        raise MismatchError(
            f"{name}: {total} rows, the model's vocabulary has {size} (vocab_size), and row {bad} beyond "
            f"it is not zero. It is not padding: correct vocab_size in config.json, or find out what wrote those rows"
        )
    return tensor[:rows]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """One rearrangement.

    Attributes:
        hf_to_megatron: the Hugging Face tensors of a parameter to Megatron's one.
        megatron_to_hf: the inverse.
        num_pieces: blocks along axis 0 of Megatron's tensor that tensor parallelism cuts separately (gate and up: 2).
    """

    hf_to_megatron: Callable[[Sequence[Tensor], HeadSizes], Tensor]
    megatron_to_hf: Callable[[Tensor, HeadSizes], tuple[Tensor, ...]]
    num_pieces: int = 1


TRANSFORMS: Mapping[str, Transform] = {
    "keep": Transform(hf_to_megatron=keep, megatron_to_hf=keep_back),
    "qkv": Transform(hf_to_megatron=interleave_qkv, megatron_to_hf=split_qkv),
    "gate_up": Transform(hf_to_megatron=concat_gate_up, megatron_to_hf=split_gate_up, num_pieces=2),
}
