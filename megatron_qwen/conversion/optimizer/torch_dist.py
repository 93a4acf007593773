"""Optimizer state in `torch_dist` checkpoints: global tensors under the keys of the weights, the rest in common state.

    optimizer.state.param.<key>        master weights of the distributed optimizer (`fully_reshardable`)
    optimizer.state.fp32_param.<key>   those of Float16OptimizerWithFloat16Params; FP32Optimizer has none
    optimizer.state.exp_avg.<key>, optimizer.state.exp_avg_sq.<key>
    common: optimizer                  parameter groups, of each chained optimizer by number if there are several
            opt_param_scheduler

Read off what megatron-core 0.16.1 and 0.19.2 save. `dp_reshardable` stores buckets instead, and does not say which
parameter is where in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_qwen.checkpoint.common_state import read_common
from megatron_qwen.checkpoint.pickles import read_metadata
from megatron_qwen.conversion.engine.pieces import TensorRows
from megatron_qwen.conversion.formats.torch_dist.chunks import ChunkReader
from megatron_qwen.conversion.formats.torch_dist.output import ChunkRows
from megatron_qwen.conversion.optimizer.state import (
    WITHOUT_OPTIMIZER,
    Kind,
    OptimizerReader,
    OptimizerState,
    Role,
    iteration_of,
    parse_groups,
    require_plain,
    with_step,
)
from megatron_qwen.conversion.parameters import Parameter, StoredPlace
from megatron_qwen.conversion.plan import PlannedParameter, find_places
from megatron_qwen.conversion.transforms import unpad_rows
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.strict_json import listing

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_STATE = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)$")
_BUCKETS = re.compile(r"^(?:chained_\d+\.)?optimizer\.distributed\.")
_MASTER_NAMES: Mapping[Kind, str] = {"distributed": "param", "mixed": "fp32_param"}
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class TorchDistOptimizer:
    """The optimizer of one `torch_dist` step; see `OptimizerSource`."""

    def __init__(self, path: Path, config: QwenConfig, metadata: Metadata) -> None:
        """Prove from the index that every parameter has its state.

        Args:
            path: the step's folder.
            config: the model in it.
            metadata: its checked `.metadata`.

        Raises:
            IncompleteInputError: tensors are missing; all of them are listed.
            CorruptInputError: a tensor has another shape than its weight.
            MismatchError: the state is not Adam's.
        """
        self.path = path
        names: dict[str, dict[str, str]] = {}
        for key in metadata.state_dict_metadata:
            if match := _STATE.match(key):
                names.setdefault(match.group(1), {})[match.group(2)] = key
        kind: Kind = next((kind for kind, name in _MASTER_NAMES.items() if name in names), "float32")
        self._names: dict[Role, str] = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        if kind in _MASTER_NAMES:
            self._names["param"] = _MASTER_NAMES[kind]
        if surplus := sorted(names.keys() - self._names.values()):
            raise MismatchError(
                f"{path}: optimizer state {listing(surplus)} is not of Megatron's Adam; {WITHOUT_OPTIMIZER}"
            )
        self._keys = {role: names.get(name, {}) for role, name in self._names.items()}
        self._places = {role: find_places(config, keys) for role, keys in self._keys.items()}
        tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if _STATE.match(key) and isinstance(value, TensorStorageMetadata)
        }
        self._headers = {key: (tuple(value.size), value.properties.dtype) for key, value in tensors.items()}
        self._check()
        self._chunks = ChunkReader(path, metadata, tensors)
        self.state = _parse_common(read_common(path, metadata), kind, str(path))

    def dtype_of(self, parameter: Parameter, role: Role) -> torch.dtype:
        """Return the dtype in which it is stored."""
        return self._headers[self._key(parameter, role)[0]][1]

    def rows(self, parameter: Parameter, role: Role, begin: int, end: int) -> Tensor:
        """Return rows of the whole tensor; with the last, vocabulary padding is proved to be zero."""
        key, place = self._key(parameter, role)
        rest = parameter.shape[1:]
        last = self._headers[key][0][len(place.index)] if end == parameter.shape[0] else end
        box = self._chunks.read(
            key, (*place.index, begin, *(0 for _ in rest)), (*(1 for _ in place.index), last - begin, *rest)
        )
        return unpad_rows(box.reshape(last - begin, *rest), end - begin, key, begin)

    def place_name(self, parameter: Parameter, index: Sequence[int] = ()) -> str:
        """Return the folder and the key of its first moment."""
        return f"{self.path}: {self._key(parameter, 'exp_avg')[0]}"

    def files(self) -> set[Path]:
        """Return the files that hold the tensors."""
        return self._chunks.files()

    def _key(self, parameter: Parameter, role: Role) -> tuple[str, StoredPlace]:
        place = self._places[role][parameter]
        assert place is not None, parameter.megatron_name  # `_check` found them all
        return self._keys[role][place.key], place

    def _check(self) -> None:
        missing = [
            f"optimizer.state.{self._names[role]}.{parameter.megatron_name}"
            for role, places in self._places.items()
            for parameter, place in places.items()
            if place is None
        ]
        if missing:
            raise IncompleteInputError(
                f"{self.path}: no {listing(missing)}; use another checkpoint, {WITHOUT_OPTIMIZER}"
            )
        for role, places in self._places.items():
            for parameter, place in places.items():
                assert place is not None
                self._check_shape(parameter, self._keys[role][place.key], place)

    def _check_shape(self, parameter: Parameter, key: str, place: StoredPlace) -> None:
        shape = self._headers[key][0] if key in self._headers else ()
        expected = (*place.leading, *parameter.shape)
        rows = len(place.leading)
        is_padded = parameter.has_vocabulary_rows and len(shape) == len(expected) and shape[rows] > expected[rows]
        if (*shape[:rows], expected[rows], *shape[rows + 1 :]) != expected or not (is_padded or shape == expected):
            raise CorruptInputError(
                f"{self.path}: {key}: shape {shape}, expected {expected}. An older Megatron-Core flattens tensors when "
                "it saves as fully_sharded_model_space; then resume there and save as fully_reshardable, "
                f"{WITHOUT_OPTIMIZER}"
            )


def open_torch_dist_optimizer(path: Path, config: QwenConfig) -> TorchDistOptimizer | None:
    """Return the optimizer of a step's folder, or None if it holds weights only.

    Raises:
        MismatchError: its state is stored by bucket.
        InputError: see `TorchDistOptimizer`.
    """
    metadata = read_metadata(path)
    if any(_BUCKETS.match(key) for key in metadata.state_dict_metadata):
        raise MismatchError(
            f"{path}: the optimizer state is stored by bucket (dp_reshardable, or dp_zero_gather_scatter), which says "
            "nothing about parameters. Resume at the layout that saved it, save as fully_reshardable (the recipe's "
            "checkpoint.optimizer_format; Megatron-LM: --dist-ckpt-optim-fully-reshardable) and reshard that, "
            f"{WITHOUT_OPTIMIZER}"
        )
    if not any(_STATE.match(key) for key in metadata.state_dict_metadata):
        return None
    return TorchDistOptimizer(path, config, metadata)


def _parse_common(common: Mapping[str, Any], kind: Kind, where: str) -> OptimizerState:
    optimizer = common.get("optimizer")
    if not isinstance(optimizer, Mapping):
        raise IncompleteInputError(f"{where}: the common state has no parameter groups; {WITHOUT_OPTIMIZER}")
    # Alone, or by number in the chain.
    parts = [part for key, part in sorted(optimizer.items(), key=str) if isinstance(key, int)] or [optimizer]
    inner = [part.get("optimizer", part) for part in parts]
    decay, no_decay = parse_groups([group for part in inner for group in part.get("param_groups", ())], where)
    step = next((part["state"].get("common_step") for part in inner if part.get("state")), None)
    return OptimizerState(
        kind=kind,
        decay=with_step(decay, step, where),
        no_decay=with_step(no_decay, step, where),
        scheduler=require_plain(common.get("opt_param_scheduler"), f"{where}: opt_param_scheduler"),
        grad_scaler=require_plain(parts[0].get("grad_scaler"), f"{where}: grad_scaler"),
        is_chained=len(parts) > 1,
        iteration=iteration_of(common, where),
    )


def torch_dist_optimizer(
    reader: OptimizerReader, parameters: Sequence[PlannedParameter], *, is_chained: bool
) -> tuple[list[ChunkRows], dict[str, Any]]:
    """Return the chunks of the optimizer's tensors, and its part of the common state.

    Args:
        reader: gives the tensors.
        parameters: with the places of the weights at the target.
        is_chained: the run that loads it has an optimizer of its own for experts; our trainer takes either.
    """
    chunks = [chunk for item in parameters for chunk in _chunks(reader, item)]
    kinds = (False, True) if is_chained else (False,)
    parts = [_common_part(reader, is_expert) for is_expert in kinds]
    optimizer = dict(enumerate(parts)) if is_chained else parts[0]
    common: dict[str, Any] = {"optimizer": optimizer, "content_metadata": dict(_CONTENT)}
    if reader.source.state.scheduler is not None:
        common["opt_param_scheduler"] = dict(reader.source.state.scheduler)
    return chunks, common


def _chunks(reader: OptimizerReader, item: PlannedParameter) -> Iterator[ChunkRows]:
    parameter, place = item.parameter, item.place
    for role in reader.roles:
        name = _MASTER_NAMES[reader.kind] if role == "param" else role
        key = f"optimizer.state.{name}.{place.key}"

        def read(begin: int, end: int, role: Role = role) -> Tensor:
            return reader.rows(parameter, role, begin, end)

        dtype = reader.dtype_of(parameter, role)
        yield ChunkRows(
            key=key,
            global_shape=(*place.leading, *parameter.shape),
            offset=(*place.index, *(0 for _ in parameter.shape)),
            rows=TensorRows(
                label=key, shape=parameter.shape, dtype=dtype, source_dtype=dtype, num_tensors=0, read=read
            ),
        )


def _common_part(reader: OptimizerReader, is_expert: bool) -> dict[str, Any]:
    state = reader.source.state
    decays = (True,) if is_expert else (True, False)
    groups = {"param_groups": [state.group(decays=each, is_expert=is_expert) for each in decays]}
    if reader.kind == "float32":
        return dict(groups)
    part: dict[str, Any] = {"optimizer": groups}
    if reader.kind == "distributed":
        part["param_state_sharding_type"] = "fully_reshardable"
    if state.grad_scaler is not None:
        part["grad_scaler"] = dict(state.grad_scaler)
    return part
