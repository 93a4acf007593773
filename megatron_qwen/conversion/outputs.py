"""The files that a converted model is made of, by target format."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial

import torch

from megatron_qwen.checkpoint.store import RELEASE, TRACKER_NAME
from megatron_qwen.conversion.engine.numerics import CheckedWeights
from megatron_qwen.conversion.engine.pieces import TensorRows, block_bytes
from megatron_qwen.conversion.engine.write import default_threads
from megatron_qwen.conversion.formats.bridge_config import bridge_file
from megatron_qwen.conversion.formats.hf.output import companion_files, config_file, hf_output
from megatron_qwen.conversion.formats.legacy.layout import NAMINGS
from megatron_qwen.conversion.formats.legacy.output import legacy_output
from megatron_qwen.conversion.formats.megatron_folder import HF_FOLDER
from megatron_qwen.conversion.formats.megatron_lm_args import megatron_lm_args
from megatron_qwen.conversion.formats.torch_dist.output import ChunkRows, torch_dist_output
from megatron_qwen.conversion.interfaces import OutputFile, WeightSource, bytes_file
from megatron_qwen.conversion.options import ConversionOptions
from megatron_qwen.conversion.parameters import extra_state_keys, hf_file_order
from megatron_qwen.conversion.plan import ConversionPlan
from megatron_qwen.parallel.layout import ParallelLayout


def hf_files(
    source: WeightSource, plan: ConversionPlan, weights: CheckedWeights, options: ConversionOptions
) -> list[OutputFile]:
    """Return the files of a Hugging Face folder."""
    tensors = {}
    for item in plan.parameters:
        for index, (name, shape) in enumerate(zip(item.parameter.hf_names, item.parameter.hf_shapes, strict=True)):
            tensors[name] = TensorRows(
                label=name,
                shape=shape,
                dtype=item.target_dtype,
                source_dtype=item.source_dtype,
                num_tensors=1,
                read=partial(weights.hf_rows, item.parameter, index),
            )
    order = hf_file_order(tuple(item.parameter for item in plan.parameters))
    return [
        *hf_output([tensors[name] for name, _ in order], options.max_shard_bytes, block=block_of(options)),
        config_file(plan.config),
        *companion_files(source.side_folders()),
    ]


def megatron_files(
    source: WeightSource, plan: ConversionPlan, weights: CheckedWeights, options: ConversionOptions
) -> list[OutputFile]:
    """Return the files of a Megatron checkpoint of weights, `release`.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    layout = options.layout or ParallelLayout()
    if options.ckpt_format == "torch":
        files = legacy_output(
            plan,
            layout,
            lambda item, begin, end: weights.rows(item.parameter, begin, end),
            folder=f"{RELEASE}/",
            naming=NAMINGS[options.transformer_impl],
            block=block_of(options),
        )
    else:
        files = torch_dist_output(
            weight_chunks(plan, weights),
            dict.fromkeys(extra_state_keys(plan.config), empty_extra_state()),
            {"args": megatron_lm_args(plan.config), "checkpoint_version": 3.0, "iteration": 0},
            folder=f"{RELEASE}/",
            block=block_of(options),
        )
    return [
        *files,
        bridge_file(plan.config, layout, f"{RELEASE}/"),
        config_file(plan.config, f"{HF_FOLDER}/"),
        *companion_files(source.side_folders(), f"{HF_FOLDER}/"),
        bytes_file(TRACKER_NAME, RELEASE.encode()),
    ]


def weight_chunks(plan: ConversionPlan, weights: CheckedWeights) -> Sequence[ChunkRows]:
    """Return every parameter as a chunk of the tensor that a torch_dist checkpoint keeps it in."""
    chunks = []
    for item in plan.parameters:
        place = item.place
        rows = TensorRows(
            label=item.parameter.megatron_name,
            shape=item.parameter.shape,
            dtype=item.target_dtype,
            source_dtype=item.source_dtype,
            num_tensors=len(item.parameter.hf_names),
            read=partial(weights.rows, item.parameter),
        )
        offset = (*place.index, *(0 for _ in item.parameter.shape))
        shape = (*place.leading, *item.parameter.shape)
        chunks.append(ChunkRows(key=place.key, global_shape=shape, offset=offset, rows=rows))
    return chunks


def empty_extra_state() -> bytes:
    """Return what stock saving stores for the extra state of a local-spec linear layer: a list with None."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def block_of(options: ConversionOptions) -> int:
    """Return the bytes of a piece."""
    return block_bytes(options.max_memory, options.threads or default_threads())
