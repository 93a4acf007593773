"""Weights into a model: from a Hugging Face or a Megatron folder, under any layout, every parameter exactly once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_qwen.checkpoint.atomic import refuse_unfinished
from megatron_qwen.conversion.formats.hf.source import HfFolder, has_hf_weights
from megatron_qwen.conversion.formats.legacy.files import is_legacy_step
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.formats.megatron_folder import find_step_folder, is_step
from megatron_qwen.conversion.formats.torch_dist.source import MegatronFolder
from megatron_qwen.conversion.parameters import (
    WHOLE,
    Parameter,
    Shard,
    global_name,
    local_layer,
    parameters,
    tied_output,
)
from megatron_qwen.errors import IncompleteInputError, MismatchError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.strict_json import listing

if TYPE_CHECKING:
    from megatron_qwen.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

Source = HfFolder | MegatronFolder | LegacyFolder


def open_source(
    folder: str | Path,
    *,
    step: int | None = None,
    config: QwenConfig | None = None,
    allow_pickle: bool = False,
    allow_unfinished: bool = False,
) -> Source:
    """Open a Hugging Face or Megatron folder and prove from its headers that it holds the model it says.

    Args:
        folder: Hugging Face (safetensors, or pytorch_model.bin), Megatron torch_dist or Megatron per-rank
            (`mp_rank_*`); of a Megatron run, or one step of it.
        step: of a run; None takes what its tracker names.
        config: the model, for a Megatron checkpoint without `hf/config.json`.
        allow_pickle: open files that are pickles (per-rank checkpoints, pytorch_model.bin), as plain data.
        allow_unfinished: open what lies in a staging folder, to look over one's own output before it gets its name.

    Raises:
        UnsafeInputError: the weights are pickles and `allow_pickle` is not set.
        InputError, ConfigError: the folder holds another model than it says, or none.
    """
    path = Path(folder)
    if not path.is_dir():
        raise IncompleteInputError(f"{path}: no such folder; expected a Hugging Face or Megatron checkpoint")
    if not allow_unfinished:
        refuse_unfinished(path)
    is_hf = has_hf_weights(path) or ((path / "config.json").is_file() and not is_step(path))
    source = HfFolder(path, allow_pickle=allow_pickle) if is_hf else _open_megatron(path, step, config, allow_pickle)
    source.plan(torch.float32)
    return source


def _open_megatron(
    path: Path, step: int | None, config: QwenConfig | None, allow_pickle: bool
) -> MegatronFolder | LegacyFolder:
    folder = find_step_folder(path, step)
    if is_legacy_step(folder):
        return LegacyFolder(folder, config=config, allow_pickle=allow_pickle)
    return MegatronFolder(folder, config=config)


def read_config(folder: str | Path) -> QwenConfig:
    """Return the model's configuration: config.json of a Hugging Face folder or that beside a Megatron checkpoint."""
    return QwenConfig.from_hf(config_folder(folder))


def config_folder(folder: str | Path) -> Path:
    """Return where the config.json of a Hugging Face or Megatron folder lies, and files beside it.

    Raises:
        IncompleteInputError: there is none.
    """
    path = Path(folder)
    for place in (path, path / "hf", path.parent / "hf"):
        if (place / "config.json").is_file():
            return place
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
    allow_pickle: bool = False,
    **build_options: Any,
) -> Any:
    """Build this rank's part of the model in `folder` and fill it.

    Args:
        folder: Hugging Face or Megatron checkpoint, as `open_source` takes it.
        dtype: of the parameters; None takes config.json's.
        layout: parallel sizes; None takes those that run, or starts a group of one rank.
        backend: layer implementation, as in `build_model`.
        step: of a training run; None takes the latest.
        allow_pickle: open weights that are pickles, as plain data.
        build_options: further arguments of `build_model`.

    Returns:
        A `GPTModel`, or the list of its chunks with virtual pipeline stages.

    Raises:
        MismatchError: folder and model differ; the tensors are listed.
    """
    from megatron_qwen.model.build import build_model_chunks

    source = open_source(folder, step=step, allow_pickle=allow_pickle)
    wanted = dtype or getattr(torch, source.config.torch_dtype)
    chunks = build_model_chunks(source.config, layout, dtype=wanted, backend=backend, **build_options)
    _fill(chunks, source)
    return chunks[0] if len(chunks) == 1 else chunks


def load_weights_into(
    model_chunks: Sequence[Any],
    folder: str | Path,
    config: QwenConfig,
    *,
    step: int | None = None,
    allow_pickle: bool = False,
) -> None:
    """Fill the chunks of a built model (wrapped by DDP or Float16Module or not) with this rank's shards.

    An optimizer that keeps its own fp32 copies has to reload them afterwards (`reload_model_params`).

    Args:
        model_chunks: the virtual stages of this pipeline rank.
        folder: Hugging Face or Megatron checkpoint, as `open_source` takes it.
        config: the model that was built; its shapes must be the folder's.
        step: of a training run; None takes the latest.
        allow_pickle: open weights that are pickles, as plain data.

    Raises:
        MismatchError: folder and model differ; the tensors are listed.
    """
    source = open_source(folder, step=step, config=config, allow_pickle=allow_pickle)
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
