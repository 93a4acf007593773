"""The files of a Megatron checkpoint made of another one, optimizer state included, so that a run goes on from it."""

from __future__ import annotations

import argparse
import io
import logging
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_qwen.checkpoint.common_state import read_common
from megatron_qwen.checkpoint.pickles import read_metadata
from megatron_qwen.checkpoint.store import TRACKER_NAME
from megatron_qwen.conversion.engine.numerics import CheckedWeights
from megatron_qwen.conversion.engine.pieces import BLOCK_BYTES
from megatron_qwen.conversion.engine.write import read_in_parallel
from megatron_qwen.conversion.formats.bridge_config import bridge_file
from megatron_qwen.conversion.formats.hf.output import companion_files, config_file
from megatron_qwen.conversion.formats.legacy.layout import NAMINGS, check_legacy_layout
from megatron_qwen.conversion.formats.legacy.output import legacy_output
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.formats.megatron_folder import HF_FOLDER
from megatron_qwen.conversion.formats.megatron_lm_args import megatron_lm_args
from megatron_qwen.conversion.formats.torch_dist.output import torch_dist_output
from megatron_qwen.conversion.formats.torch_dist.source import MegatronFolder
from megatron_qwen.conversion.interfaces import OutputFile, WeightSource, bytes_file
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.optimizer.legacy import LegacyOptimizer, open_legacy_optimizer
from megatron_qwen.conversion.optimizer.legacy_output import LegacyOptimizerOutput
from megatron_qwen.conversion.optimizer.run_record import RunRecord, read_run_record
from megatron_qwen.conversion.optimizer.state import WITHOUT_OPTIMIZER, OptimizerReader, OptimizerSource, Role
from megatron_qwen.conversion.optimizer.torch_dist import (
    TorchDistOptimizer,
    open_torch_dist_optimizer,
    torch_dist_optimizer,
)
from megatron_qwen.conversion.options import ConversionOptions
from megatron_qwen.conversion.outputs import block_of, empty_extra_state, megatron_files, weight_chunks
from megatron_qwen.conversion.parameters import (
    Parameter,
    extra_state_keys,
    is_homogeneous,
    parameters,
    stored_place,
)
from megatron_qwen.conversion.plan import ConversionPlan, PlannedParameter
from megatron_qwen.errors import ConfigError, CorruptInputError, Interrupted
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
    reader = OptimizerReader(optimizer, source, distributed=options.distributed_optimizer)
    record = read_run_record(source.path, optimizer.state, _arguments(source))
    folder = f"iter_{optimizer.state.iteration:07d}/"
    if options.ckpt_format == "torch":
        files = _legacy_files(plan, weights, reader, record, folder, options)
    else:
        files = _torch_dist_files(source, plan, weights, reader, record, folder, options)
    layout = source.layout if isinstance(source, LegacyFolder) else None
    return [
        *files,
        bridge_file(plan.config, options.layout or layout, folder),
        config_file(plan.config, f"{HF_FOLDER}/"),
        *companion_files(source.side_folders(), f"{HF_FOLDER}/"),
        bytes_file(TRACKER_NAME, str(optimizer.state.iteration).encode()),
    ]


def open_optimizer(source: WeightSource) -> OptimizerSource | None:
    """Return the optimizer in the checkpoint of `source`, or None if it holds weights alone.

    `source.check_unchanged` covers its files too.

    Raises:
        InputError: its state is damaged, incomplete, or stored by bucket.
    """
    optimizer: LegacyOptimizer | TorchDistOptimizer | None = None
    if isinstance(source, LegacyFolder):
        optimizer = open_legacy_optimizer(source)
    elif isinstance(source, MegatronFolder):
        optimizer = open_torch_dist_optimizer(source.path, source.config)
    if optimizer is not None and isinstance(source, LegacyFolder | MegatronFolder):
        source.watch(optimizer.files())
    return optimizer


def verify_optimizer(
    folder: Path,
    source: WeightSource,
    options: ConversionOptions,
    *,
    threads: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Compare every master weight and moment of an output, bit for bit, with the source.

    Args:
        folder: the output, still in its staging folder.
        source: what was resharded.
        options: of the conversion.
        threads: that read.
        is_stopped: asked before each tensor.

    Raises:
        CorruptInputError: naming what differs.
        Interrupted: `is_stopped` said so.
    """
    optimizer = open_optimizer(source) if options.optimizer else None
    if optimizer is None:
        return
    output = open_source(folder, allow_pickle=True, allow_unfinished=True)  # our own files
    written = open_optimizer(output)
    assert written is not None, folder
    wanted = OptimizerReader(optimizer, source, distributed=options.distributed_optimizer)
    found = OptimizerReader(written, output)
    work = [
        partial(_compare, parameter, role, found, wanted, is_stopped)
        for parameter in parameters(source.config)
        for role in wanted.roles
    ]
    read_in_parallel(work, threads)


def _compare(
    parameter: Parameter, role: Role, found: OptimizerReader, wanted: OptimizerReader, is_stopped: Callable[[], bool]
) -> None:
    rows = parameter.shape[0]
    step = max(1, BLOCK_BYTES * rows // (4 * math.prod(parameter.shape)))
    for begin in range(0, rows, step):
        if is_stopped():
            raise Interrupted("interrupted")
        end = min(begin + step, rows)
        one, two = (each.rows(parameter, role, begin, end).contiguous() for each in (found, wanted))
        if one.dtype != two.dtype or not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            raise CorruptInputError(
                f"{role} of {parameter.megatron_name}: rows {begin} to {end} of the output are not those of the "
                "source. The disk or the memory of this machine returned other bytes than it was given; the output is "
                "deleted"
            )


def _legacy_files(
    plan: ConversionPlan,
    weights: CheckedWeights,
    reader: OptimizerReader,
    record: RunRecord,
    folder: str,
    options: ConversionOptions,
) -> list[OutputFile]:
    layout, block = options.layout or ParallelLayout(), block_of(options)
    check_legacy_layout(plan.config, layout)
    naming = NAMINGS[options.transformer_impl]
    logger.warning(
        "%s: random states are not carried into per-rank files: a resume seeds anew (Megatron-LM: give --no-load-rng)",
        reader.source.path,
    )
    return [
        *legacy_output(
            plan,
            layout,
            lambda item, begin, end: weights.rows(item.parameter, begin, end),
            folder=folder,
            iteration=record.step,
            naming=naming,
            arguments=_run_arguments(plan, reader, record, layout, "torch", options.transformer_impl),
            optimizer=LegacyOptimizerOutput(reader, plan, layout, naming=naming, block=block),
            block=block,
        ),
        *record.files(folder, layout, carries_random_states=False),
    ]


def _torch_dist_files(
    source: WeightSource,
    plan: ConversionPlan,
    weights: CheckedWeights,
    reader: OptimizerReader,
    record: RunRecord,
    folder: str,
    options: ConversionOptions,
) -> list[OutputFile]:
    layout = source.layout if isinstance(source, LegacyFolder) else None
    objects = dict.fromkeys(extra_state_keys(plan.config), empty_extra_state())
    random_states: Mapping[str, bytes] = {}
    if layout is None:
        random_states = _random_states(source.path, read_metadata(source.path))
    else:
        plan = replace(plan, parameters=tuple(_own_place(item, plan, record) for item in plan.parameters))
        logger.warning("%s: random states of per-rank files are not carried over: a resume seeds anew", source.path)
    chunks, common = torch_dist_optimizer(reader, plan.parameters, is_chained=reader.source.state.is_chained)
    common |= {
        "args": _run_arguments(plan, reader, record, layout or ParallelLayout(), "torch_dist", "local"),
        "checkpoint_version": 3.0,
        "iteration": record.step,
    }
    return [
        *torch_dist_output(
            [*weight_chunks(plan, weights), *chunks],
            {**objects, **random_states},
            common,
            folder=folder,
            block=block_of(options),
        ),
        *record.files(folder, layout, carries_random_states=bool(random_states)),
    ]


def _own_place(item: PlannedParameter, plan: ConversionPlan, record: RunRecord) -> PlannedParameter:
    """Return the parameter at the key under which the run that goes on looks for it.

    The norm in front of a MoE layer has two keys. Our models and Transformer Engine's use its own name.
    """
    family = item.parameter.family
    if record.record is None or family.scope != "moe" or family.megatron != "pre_mlp_layernorm.weight":
        return item
    stacked = is_homogeneous(plan.config)
    return replace(item, place=stored_place(item.parameter, plan.config, stacked=stacked, name=family.megatron))


def _arguments(source: WeightSource) -> object:
    """Return Megatron-LM's arguments in the checkpoint, or None."""
    if isinstance(source, LegacyFolder):
        return next(iter(source.contents.values())).arguments
    return read_common(source.path, read_metadata(source.path)).get("args")


def _run_arguments(
    plan: ConversionPlan,
    reader: OptimizerReader,
    record: RunRecord,
    layout: ParallelLayout,
    ckpt_format: str,
    transformer_impl: str,
) -> argparse.Namespace:
    arguments = megatron_lm_args(plan.config, layout, ckpt_format=ckpt_format, transformer_impl=transformer_impl)
    run = {
        **record.arguments,
        "iteration": record.step,
        "use_distributed_optimizer": reader.kind == "distributed",
        "overlap_grad_reduce": False,
    }
    return argparse.Namespace(**{**vars(arguments), **run})


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
