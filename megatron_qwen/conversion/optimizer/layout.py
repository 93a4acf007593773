"""Which number or offset Megatron's optimizers give each parameter of a rank: integers and strings only.

`get_megatron_optimizer` sorts a rank's parameters into groups of equal hyper-parameters: matrices, which decay, before
biases and norms, which do not, each in the order of `named_parameters()`. With experts that are reduced over other
ranks than the rest (ep > 1), a second optimizer is chained behind the first for them. A plain optimizer numbers its
parameters group by group; the distributed one lays the parameters of each model chunk behind each other in a buffer,
from the last to the first (megatron/core/optimizer/__init__.py and distributed/param_and_grad_buffer.py, 0.16 to 0.19).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qwen.conversion.formats.legacy.layout import LocalTensor, ModelChunk, RankFile
from megatron_qwen.parallel.layout import ParallelLayout

# The distributed optimizer starts parameters at multiples of this many elements, and fills buckets up to a multiple of
# twice as many and of the data-parallel size; what a bucket is filled up with does not reach a checkpoint.
_PARAMETER_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Group:
    """The parameters of a rank with equal hyper-parameters, in the order of their numbers; may be empty.

    Attributes:
        decays: weight decay applies.
        is_expert: of the optimizer for experts.
    """

    decays: bool
    is_expert: bool
    tensors: tuple[LocalTensor, ...]


@dataclass(frozen=True, kw_only=True)
class BufferPlace:
    """Elements `begin` to `end` of a buffer are the tensor, row by row."""

    tensor: LocalTensor
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """The parameters of one model chunk as the distributed optimizer saves them.

    Attributes:
        places: in the order of their offsets; between them lies alignment.
        num_elements: of the buffer, alignment included.
    """

    places: tuple[BufferPlace, ...]
    num_elements: int


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the chained optimizers of a rank.

    Attributes:
        is_expert: the one for experts.
        groups: in the order of the numbers.
        chunks: the tensors of each model chunk that has any, in the order of `named_parameters()`.
        shares_embedding: the vocabulary matrix has a copy in another pipeline stage.
    """

    is_expert: bool
    groups: tuple[Group, ...]
    chunks: tuple[tuple[LocalTensor, ...], ...]
    shares_embedding: bool

    @property
    def num_tensors(self) -> int:
        """Number of parameters."""
        return sum(len(group.tensors) for group in self.groups)

    def buffers(self, bucket_size: int | None = None) -> tuple[Buffer, ...]:
        """Return the distributed optimizer's buffers.

        Args:
            bucket_size: of the first chunk of the first pipeline stage, in elements; None is one bucket, as without
                --overlap-grad-reduce. The others are always one bucket.
        """
        sizes = [bucket_size] + [None] * len(self.chunks)
        return tuple(
            _buffer(tensors, self.shares_embedding, size) for tensors, size in zip(self.chunks, sizes, strict=False)
        )


def members(rank_file: RankFile, layout: ParallelLayout, *, is_tied: bool, splits_experts: bool) -> tuple[Member, ...]:
    """Return the chained optimizers of a rank, the dense one first.

    Args:
        rank_file: the rank's tensors.
        layout: of the checkpoint.
        is_tied: the output matrix is the embedding.
        splits_experts: the model's experts have an optimizer of their own; see `splits_experts`.
    """
    kinds = (False, True) if splits_experts else (False,)
    return tuple(_member(rank_file.chunks, is_expert, splits_experts, is_tied and layout.pp > 1) for is_expert in kinds)


def holds_dense_state(rank_file: RankFile, layout: ParallelLayout) -> bool:
    """Whether the rank's `distrib_optim.pt` holds the dense optimizer's state: it is of data-parallel rank 0."""
    etp = layout.expert_tensor_parallel_size
    return rank_file.expert_rank == rank_file.tensor_rank // etp % layout.ep


def holds_expert_state(rank_file: RankFile, layout: ParallelLayout) -> bool:
    """Whether the rank's `distrib_optim.pt` holds the experts' state: it is of expert-data-parallel rank 0."""
    first = rank_file.expert_rank * layout.expert_tensor_parallel_size + rank_file.expert_tensor_rank
    return rank_file.tensor_rank == first % layout.tp


def default_bucket_size(dp: int) -> int:
    """Return Megatron's bucket size under --overlap-grad-reduce, in elements, where the command line names none."""
    return max(40_000_000, 1_000_000 * dp)


def _member(chunks: Sequence[ModelChunk], is_expert: bool, splits_experts: bool, shares_embedding: bool) -> Member:
    held = [
        tuple(each for each in chunk.tensors if (splits_experts and each.parameter.expert is not None) == is_expert)
        for chunk in chunks
    ]
    tensors = [each for chunk in held for each in chunk]
    # Experts have matrices only, and Megatron makes no group that is empty on all ranks.
    decays = (True,) if is_expert else (True, False)
    return Member(
        is_expert=is_expert,
        groups=tuple(
            Group(
                decays=decay,
                is_expert=is_expert,
                tensors=tuple(each for each in tensors if (len(each.shape) > 1) == decay),
            )
            for decay in decays
        ),
        chunks=tuple(chunk for chunk in held if chunk),
        shares_embedding=shares_embedding,
    )


def _buffer(tensors: Sequence[LocalTensor], shares_embedding: bool, bucket_size: int | None) -> Buffer:
    places: list[BufferPlace] = []
    start, offset = 0, 0  # of the bucket, and within it; each bucket starts at an aligned address
    for tensor in reversed(tensors):
        offset = _align(offset)
        is_alone = shares_embedding and tensor.parameter.has_vocabulary_rows
        if is_alone:  # a bucket of its own; what came before keeps the alignment it was given for this tensor
            start, offset = start + offset, 0
        size = math.prod(tensor.shape)
        places.append(BufferPlace(tensor=tensor, begin=start + offset, end=start + offset + size))
        offset += size
        if is_alone or (bucket_size is not None and offset >= bucket_size):
            start, offset = start + offset, 0
    return Buffer(places=tuple(places), num_elements=start + offset)


def _align(offset: int) -> int:
    return -(-offset // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT
