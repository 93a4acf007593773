"""The files of a Megatron checkpoint made of another one, optimizer state included, so that a run goes on from it."""

from __future__ import annotations

import argparse
import io
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_qwen.checkpoint.common_state import read_common
from megatron_qwen.checkpoint.pickles import read_metadata
from megatron_qwen.checkpoint.store import TRACKER_NAME
from megatron_qwen.conversion.engine.numerics import CheckedWeights
from megatron_qwen.conversion.formats.bridge_config import bridge_file
from megatron_qwen.conversion.formats.hf.output import companion_files, config_file
from megatron_qwen.conversion.formats.legacy.layout import NAMINGS, check_legacy_layout
from megatron_qwen.conversion.formats.legacy.output import legacy_output
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.formats.megatron_folder import HF_FOLDER
from megatron_qwen.conversion.formats.megatron_lm_args import megatron_lm_args
from megatron_qwen.conversion.formats.torch_dist.output import torch_dist_output
from megatron_qwen.conversion.interfaces import OutputFile, WeightSource, bytes_file
from megatron_qwen.conversion.optimizer.legacy_output import LegacyOptimizerOutput
from megatron_qwen.conversion.optimizer.opening import open_optimizer
from megatron_qwen.conversion.optimizer.run_record import RunRecord, read_run_record
from megatron_qwen.conversion.optimizer.state import WITHOUT_OPTIMIZER, OptimizerReader
from megatron_qwen.conversion.optimizer.torch_dist import torch_dist_optimizer
from megatron_qwen.conversion.options import ConversionOptions
from megatron_qwen.conversion.outputs import block_of, empty_extra_state, megatron_files, weight_chunks
from megatron_qwen.conversion.parameters import (
    extra_state_keys,
    is_homogeneous,
    stored_place,
)
from megatron_qwen.conversion.plan import ConversionPlan, PlannedParameter
from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

logger = logging.getLogger(__name__)

_RANDOM_STATES = "rng_state/"


def reshard_files(
    source: WeightSource, plan: ConversionPlan, weights: CheckedWeights, options: ConversionOptions
) -> list[OutputFile]:
    """Return the files of the target: `iter_*` with the optimizer state, or `release` where there is none.

    Args:
        source: a Megatron checkpoint.
        plan: of its weights.
        weights: they, checked and cast.
        options: `optimizer`, `distributed_optimizer`, `ckpt_format` and `layout` count here.

    Raises:
        ConfigError: a cast is asked for, or the layout does not fit the model.
        InputError: the optimizer state is damaged, incomplete, or stored in a way that cannot be resharded.
    """
    optimizer = open_optimizer(source) if options.optimizer else None
    if optimizer is None:
        if not options.optimizer:
            logger.info("%s: the optimizer state is left out as asked; the target holds weights alone", source.path)
        return megatron_files(source, plan, weights, options)
    if any(item.source_dtype != item.target_dtype for item in plan.parameters):
        raise ConfigError(
            f"--dtype: {source.path} holds optimizer state, whose master weights belong to the weights as they are; "
            f"leave out --dtype, {WITHOUT_OPTIMIZER}"
        )
    step = _Step(
        source=source,
        plan=plan,
        weights=weights,
        reader=OptimizerReader(optimizer, source, distributed=options.distributed_optimizer),
        record=read_run_record(source.path, optimizer.state, _arguments(source)),
        options=options,
    )
    return [
        *(step.rank_files() if options.ckpt_format == "torch" else step.torch_dist_files()),
        bridge_file(plan.config, options.layout or step.source_layout, step.folder),
        config_file(plan.config, f"{HF_FOLDER}/"),
        *companion_files(source.side_folders(), f"{HF_FOLDER}/"),
        bytes_file(TRACKER_NAME, str(step.record.step).encode()),
    ]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The training step to be written.

    Attributes:
        source: what it is made of.
        plan: of the weights.
        weights: they, checked and cast.
        reader: of the optimizer.
        record: what the run left beside tensors.
        options: as asked for.
    """

    source: WeightSource
    plan: ConversionPlan
    weights: CheckedWeights
    reader: OptimizerReader
    record: RunRecord
    options: ConversionOptions

    @property
    def folder(self) -> str:
        """Where the step lies in the target."""
        return f"iter_{self.record.step:07d}/"

    @property
    def source_layout(self) -> ParallelLayout | None:
        """The layout in which it was saved; None for a checkpoint without one."""
        return self.source.layout if isinstance(self.source, LegacyFolder) else None

    def rank_files(self) -> list[OutputFile]:
        """Return the files of every rank, weights and optimizer in them."""
        layout, block = self.options.layout or ParallelLayout(), block_of(self.options)
        check_legacy_layout(self.plan.config, layout)
        naming = NAMINGS[self.options.transformer_impl]
        logger.warning(
            "%s: random states are not carried into per-rank files: a resume seeds anew (Megatron-LM: give "
            "--no-load-rng)",
            self.source.path,
        )
        return [
            *legacy_output(
                self.plan,
                layout,
                lambda item, begin, end: self.weights.rows(item.parameter, begin, end),
                folder=self.folder,
                iteration=self.record.step,
                naming=naming,
                arguments=self._run_arguments(layout, "torch", self.options.transformer_impl),
                optimizer=LegacyOptimizerOutput(self.reader, self.plan, layout, naming=naming, block=block),
                block=block,
            ),
            *self.record.files(self.folder, layout, carries_random_states=False),
        ]

    def torch_dist_files(self) -> list[OutputFile]:
        """Return the torch_dist files and what our runs keep beside them."""
        layout, plan = self.source_layout, self.plan
        random_states: Mapping[str, bytes] = {}
        if layout is None:
            random_states = _random_states(self.source.path, read_metadata(self.source.path))
        else:
            plan = replace(plan, parameters=tuple(self._own_place(item) for item in plan.parameters))
            logger.warning(
                "%s: random states of per-rank files are not carried over: a resume seeds anew", self.source.path
            )
        is_chained = self.reader.source.state.is_chained
        chunks, common = torch_dist_optimizer(self.reader, plan.parameters, is_chained=is_chained)
        common |= {
            "args": self._run_arguments(layout or ParallelLayout(), "torch_dist", "local"),
            "checkpoint_version": 3.0,
            "iteration": self.record.step,
        }
        return [
            *torch_dist_output(
                [*weight_chunks(plan, self.weights), *chunks],
                {**dict.fromkeys(extra_state_keys(plan.config), empty_extra_state()), **random_states},
                common,
                folder=self.folder,
                block=block_of(self.options),
            ),
            *self.record.files(self.folder, layout, carries_random_states=bool(random_states)),
        ]

    def _own_place(self, item: PlannedParameter) -> PlannedParameter:
        """Return the parameter at the key under which the run that goes on looks for it.

        The norm in front of a MoE layer has two keys. Our models and Transformer Engine's use its own name.
        """
        family, config = item.parameter.family, self.plan.config
        if self.record.record is None or family.scope != "moe" or family.megatron != "pre_mlp_layernorm.weight":
            return item
        stacked = is_homogeneous(config)
        return replace(item, place=stored_place(item.parameter, config, stacked=stacked, name=family.megatron))

    def _run_arguments(self, layout: ParallelLayout, ckpt_format: str, transformer_impl: str) -> argparse.Namespace:
        model = megatron_lm_args(self.plan.config, layout, ckpt_format=ckpt_format, transformer_impl=transformer_impl)
        run = {
            **self.record.arguments,
            "iteration": self.record.step,
            "use_distributed_optimizer": self.reader.kind == "distributed",
            "overlap_grad_reduce": False,
        }
        return argparse.Namespace(**{**vars(model), **run})


def _arguments(source: WeightSource) -> object:
    """Return Megatron-LM's arguments in the checkpoint, or None."""
    if isinstance(source, LegacyFolder):
        return next(iter(source.contents.values())).arguments
    return read_common(source.path, read_metadata(source.path)).get("args")


def _random_states(path: Path, metadata: Metadata) -> dict[str, bytes]:
    """Return the random states of a step's ranks as they are stored; none if one of them is more than plain data."""
    states = {}
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith(_RANDOM_STATES):
            with (path / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                states[index.fqn] = stream.read(place.length)
    try:
        for raw in states.values():
            torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("%s: random states are not carried over (%.200s): a resume seeds anew", path, reason)
        return {}
    return states
