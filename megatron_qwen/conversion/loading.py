"""Weights into a model: from a Hugging Face or a Megatron folder, under any layout, every parameter exactly once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_qwen.checkpoint.safetensors_header import INDEX_NAME, SINGLE_NAME
from megatron_qwen.checkpoint.strict_json import listing
from megatron_qwen.conversion.hf import HfFolder
from megatron_qwen.conversion.megatron import MegatronFolder
from megatron_qwen.conversion.parameters import (
    WHOLE,
    Parameter,
    Shard,
    global_name,
    local_layer,
    parameters,
    tied_output,
)
from megatron_qwen.conversion.plan import plan_export, plan_import
from megatron_qwen.errors import IncompleteInputError, MismatchError
from megatron_qwen.model.config import QwenConfig

if TYPE_CHECKING:
    from megatron_qwen.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

Source = HfFolder | MegatronFolder


def open_source(folder: str | Path, *, step: int | None = None, config: QwenConfig | None = None) -> Source:
    """Open a Hugging Face or Megatron folder and prove from its headers that it holds the model it says.

    Raises:
        InputError, ConfigError: it does not, or it is neither.
    """
    path = Path(folder)
    if not path.is_dir():
        raise IncompleteInputError(f"{path}: no such folder; expected a Hugging Face or Megatron checkpoint")
    if (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file():
        hf = HfFolder(path)
        plan_import(hf.config, hf.entries, where=str(path), dtype=torch.float32)
        return hf
    if (path / "config.json").is_file() and not (path / ".metadata").is_file():
        HfFolder(path)  # says what is wrong with the weights
    megatron = MegatronFolder(path, step=step, config=config)
    plan_export(megatron.config, megatron.stored, where=str(megatron.path))
    return megatron


def read_config(folder: str | Path) -> QwenConfig:
    """Return the model's configuration: config.json of a Hugging Face folder or that beside a Megatron checkpoint."""
    path = Path(folder)
    for place in (path, path / "hf", path.parent / "hf"):
        if (place / "config.json").is_file():
            return QwenConfig.from_hf(place)
    raise IncompleteInputError(
        f"{path}: neither config.json nor hf/config.json; expected a Hugging Face or Megatron folder"
    )


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    layout: ParallelLayout | None = None,
    *,
    backend: str = "auto",
    step: int | None = None,
    **build_options: Any,
) -> Any:
    """Build this rank's part of the model in `folder` and fill it.

    Args:
        folder: Hugging Face or Megatron (torch_dist) checkpoint.
        dtype: of the parameters; None takes config.json's.
        layout: parallel sizes; None takes those that run, or starts a group of one rank.
        backend: layer implementation, as in `build_model`.
        step: of a training run; None takes the latest.
        build_options: further arguments of `build_model`.

    Returns:
        A `GPTModel`, or the list of its chunks with virtual pipeline stages.

    Raises:
        MismatchError: folder and model differ; the tensors are listed.
    """
    from megatron_qwen.model.build import build_model_chunks

    source = open_source(folder, step=step)
    wanted = dtype or getattr(torch, source.config.torch_dtype)
    chunks = build_model_chunks(source.config, layout, dtype=wanted, backend=backend, **build_options)
    _fill(chunks, source)
    return chunks[0] if len(chunks) == 1 else chunks


def load_weights_into(
    model_chunks: Sequence[Any], folder: str | Path, config: QwenConfig, *, step: int | None = None
) -> None:
    """Fill the chunks of a built model (wrapped by DDP or Float16Module or not) with this rank's shards.

    An optimizer that keeps its own fp32 copies has to reload them afterwards (`reload_model_params`).

    Args:
        model_chunks: the virtual stages of this pipeline rank.
        folder: Hugging Face or Megatron (torch_dist) checkpoint.
        config: the model that was built; its shapes must be the folder's.
        step: of a training run; None takes the latest.

    Raises:
        MismatchError: folder and model differ; the tensors are listed.
    """
    source = open_source(folder, step=step, config=config)
    if parameters(config) != parameters(source.config):
        raise MismatchError(f"{folder}: holds a model of other shapes than the one that was built")
    _fill(model_chunks, source)


@dataclass(frozen=True)
class _Target:
    tensor: torch.Tensor
    parameter: Parameter
    shard: Shard


def _fill(chunks: Sequence[Any], source: Source) -> None:
    casts: set[tuple[torch.dtype, torch.dtype]] = set()
    for target in _targets(chunks, source.config):
        parameter, shard, tensor = target.parameter, target.shard, target.tensor
        rows = tensor.shape[0] * shard.size if parameter.has_vocabulary_rows else None
        weight = source.read(parameter, shard, vocabulary_rows=rows)
        if weight.shape != tensor.shape:
            raise MismatchError(
                f"{parameter.megatron_name}: shard {shard.rank} of {shard.size} has shape {tuple(weight.shape)} in "
                f"{source.path}, {tuple(tensor.shape)} in the model"
            )
        if weight.dtype != tensor.dtype:
            casts.add((weight.dtype, tensor.dtype))
        with torch.no_grad():
            tensor.copy_(weight)
    for stored, wanted in sorted(casts, key=str):
        logger.info("%s: weights stored as %s are loaded as %s", source.path, stored, wanted)


def _targets(chunks: Sequence[Any], config: QwenConfig) -> list[_Target]:
    """Pair every parameter of the model with its row; all of them, and all of the layers' rows, exactly once."""
    places = _ranks()
    by_name = {name: item for item in parameters(config) for name in (item.megatron_name, item.engine_name)}
    if config.tie_word_embeddings:
        # The last pipeline stage holds a copy of the embedding under the output layer's name.
        by_name[tied_output(config).megatron_name] = parameters(config)[0]
    offset = places.expert_rank * (config.num_experts // places.expert_size)
    targets, unknown = [], []
    layers: set[int | None] = set()
    for chunk in chunks:
        for name, tensor, layer in _named_parameters(chunk):
            layers.add(layer)
            parameter = by_name.get(global_name(name, layer=layer, expert_offset=offset))
            if parameter is None:
                unknown.append(name)
                continue
            shard = places.expert_tensor if parameter.family.is_expert else places.tensor
            targets.append(_Target(tensor, parameter, shard if parameter.family.shard_axis is not None else WHOLE))
    experts = range(offset, offset + config.num_experts // places.expert_size)
    found = {target.parameter for target in targets}
    absent = [
        item.megatron_name
        for item in parameters(config)
        if item.layer in layers - {None} and (item.expert is None or item.expert in experts) and item not in found
    ]
    if unknown or absent or len(found) != len(targets) - _num_output_copies(targets, config):
        raise MismatchError(
            f"the model that was built is not the configured one. Parameters without a weight: "
            f"{listing(unknown) or 'none'}. Weights without a parameter: {listing(absent) or 'none'}"
        )
    return targets


def _num_output_copies(targets: Sequence[_Target], config: QwenConfig) -> int:
    copies = sum(target.parameter.has_vocabulary_rows for target in targets)
    return max(0, copies - 1) if config.tie_word_embeddings else 0


def _named_parameters(chunk: Any) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Yield name, tensor and global layer number of a chunk's parameters; wrappers taken off."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    for name, parameter in chunk.named_parameters():
        index = local_layer(name)
        yield name, parameter.data, None if index is None else chunk.decoder.layers[index].layer_number - 1


@dataclass(frozen=True)
class _Ranks:
    tensor: Shard
    expert_tensor: Shard
    expert_rank: int
    expert_size: int


def _ranks() -> _Ranks:
    from megatron.core import parallel_state as state

    return _Ranks(
        tensor=Shard(rank=state.get_tensor_model_parallel_rank(), size=state.get_tensor_model_parallel_world_size()),
        expert_tensor=Shard(
            rank=state.get_expert_tensor_parallel_rank(), size=state.get_expert_tensor_parallel_world_size()
        ),
        expert_rank=state.get_expert_model_parallel_rank(),
        expert_size=state.get_expert_model_parallel_world_size(),
    )
