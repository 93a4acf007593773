"""The rank files of a per-rank checkpoint: opened, their layout found, and compared with what they must hold."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qwen.checkpoint.inside import check_inside
from megatron_qwen.checkpoint.torch_file import TensorPlace, locate, open_torch_file
from megatron_qwen.conversion.formats.legacy.layout import RANK_FILE, ModelChunk, Naming, RankFile
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.strict_json import listing

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FOLDER = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")
_CHUNK = re.compile(r"^model(\d*)$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_GROUPED = re.compile(r"^(.*\.mlp\.experts\.)weight([12])$")
_EXPERT_OUTPUT = re.compile(r"\.experts\.(local_experts\.\d+\.linear_fc2\.weight|linear_fc2\.weight\d+)$")
_EMBEDDING = "embedding.word_embeddings.weight"
_NUMBER = re.compile(r"(?<=\.layers\.)\d+|(?<=\.local_experts\.)\d+|(?<=\.weight)\d+$")
# What modules of other versions or settings keep beside the weights; it is recomputed.
_NOT_WEIGHTS = ("_extra_state", "inv_freq", "local_tokens_per_expert")


@dataclass(frozen=True)
class RankContent:
    """What one rank file holds.

    Attributes:
        file: its path.
        ranks: the numbers in its folder's name.
        arguments: Megatron-LM's, or None.
        chunks: weights of each model chunk by key and name, on device "meta"; experts that one tensor holds
            (`experts.weight1`) under the names of single experts.
        content: everything in the file: iteration, optimizer, random states.
    """

    file: Path
    ranks: tuple[int, ...]
    arguments: argparse.Namespace | None
    chunks: Mapping[str, Mapping[str, Tensor]]
    content: Mapping[str, Any]

    def place(self, chunk: str, name: str) -> TensorPlace:
        """Return where a weight lies in the file."""
        return locate(self.file, self.chunks[chunk][name], name)


def is_legacy_step(folder: Path) -> bool:
    """Whether a step's folder holds a per-rank checkpoint."""
    return any(_FOLDER.match(path.name) for path in folder.glob("mp_rank_*"))


def open_rank_files(step_folder: Path) -> dict[str, RankContent]:
    """Open every rank file of a step; return them by folder name.

    Raises:
        IncompleteInputError: a folder has no rank file, or there is none.
        UnsafeInputError, CorruptInputError: see `open_torch_file`; or a file is a link out of the folder.
        MismatchError: one is of a format that megatron-core never wrote.
    """
    folders = sorted(path for path in step_folder.glob("mp_rank_*") if _FOLDER.match(path.name))
    empty = [folder.name for folder in folders if not (folder / RANK_FILE).is_file()]
    if empty or not folders:
        raise IncompleteInputError(f"{step_folder}: no {RANK_FILE} in {listing(empty) or 'any mp_rank_* folder'}")
    return {folder.name: _open(folder) for folder in folders}


def _open(folder: Path) -> RankContent:
    file = folder / RANK_FILE
    check_inside(folder.parent, f"{folder.name}/{RANK_FILE}", file)
    content = open_torch_file(file)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CorruptInputError(f"{file}: holds a {type(content).__name__}, expected a dict with `model`")
    chunks = {key: value for key, value in content.items() if _CHUNK.match(key)}
    if not chunks:
        raise CorruptInputError(f"{file}: no `model` among {listing(sorted(content)) or 'nothing'}")
    version = content.get("checkpoint_version", 0)
    if version != 3.0:
        raise MismatchError(
            f"{file}: checkpoint_version {version}, expected 3.0; older ones order query, key and value otherwise. "
            "Load and save it with the Megatron-LM that wrote it"
        )
    arguments = content.get("args")
    match = _FOLDER.match(folder.name)
    assert match, folder
    return RankContent(
        file=file,
        ranks=tuple(int(group) for group in match.groups() if group is not None),
        arguments=arguments if isinstance(arguments, argparse.Namespace) else None,
        chunks={key: dict(_weights(file, key, value)) for key, value in chunks.items()},
        content=content,
    )


def _weights(file: Path, key: str, chunk: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(chunk, dict):
        raise CorruptInputError(f"{file}: `{key}` is a {type(chunk).__name__}, expected a state dict")
    if "language_model" in chunk:
        raise MismatchError(
            f"{file}: `{key}` is nested (`language_model`): a model of Megatron-LM before megatron-core. Convert it to "
            "megatron-core first, with tools/checkpoint/convert.py of a Megatron-LM that still reads it"
        )
    for name, value in chunk.items():
        if not isinstance(name, str) or name.rpartition(".")[2].startswith(_NOT_WEIGHTS):
            continue
        if not isinstance(value, Tensor):
            raise CorruptInputError(f"{file}: `{key}`: {name} is a {type(value).__name__}, expected a tensor")
        yield name, value


def parallel_sizes(step_folder: Path, contents: Mapping[str, RankContent]) -> dict[str, int]:
    """Return tp, pp, vpp and ep: those in the files' arguments or, without arguments, what the files are called.

    Raises:
        MismatchError: names and arguments contradict each other.
    """
    sizes = _sizes_of_names(contents)
    arguments = next(iter(contents.values())).arguments
    return sizes if arguments is None else _compare_sizes(step_folder, sizes, arguments)


def split_grouped_experts(content: RankContent, experts: int) -> RankContent:
    """Replace `experts.weight1` and `experts.weight2`, which hold all of a rank's experts, by views of each.

    They are those of megatron-core's GroupedMLP (up to 0.16), which reads weight1 [h, n f] as n blocks [h, f] and
    weight2 [n f, h] as n blocks [f, h]: per expert the transposes of linear_fc1.weight and linear_fc2.weight.
    """
    chunks = {key: dict(_split_grouped(chunk, experts)) for key, chunk in content.chunks.items()}
    return dataclasses.replace(content, chunks=chunks)


def _split_grouped(chunk: Mapping[str, Tensor], experts: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in chunk.items():
        match = _GROUPED.match(name)
        if match is None or tensor.dim() != 2 or experts == 0 or tensor.shape[int(match.group(2) == "1")] % experts:
            yield name, tensor
            continue
        rows, columns = tensor.shape
        height, width = (rows, columns // experts) if match.group(2) == "1" else (rows // experts, columns)
        for expert in range(experts):
            offset = tensor.storage_offset() + expert * height * width
            view = tensor.as_strided((width, height), (1, width), offset)
            yield f"{match.group(1)}local_experts.{expert}.linear_fc{match.group(2)}.weight", view


def find_layout(
    step_folder: Path, contents: Mapping[str, RankContent], config: QwenConfig, sizes: Mapping[str, int]
) -> tuple[ParallelLayout, Naming, int]:
    """Return the layout of a checkpoint, how its parameters are named, and its vocabulary rows with padding.

    Raises:
        MismatchError: the stages do not hold the model's layers.
        IncompleteInputError: no file holds the embedding, or a stage's files are missing.
    """
    layers = _layers_per_stage(step_folder, contents, sizes, config)
    names = [name for content in contents.values() for chunk in content.chunks.values() for name in chunk]
    naming = Naming(
        fused_norms=any(name.endswith("linear_qkv.layer_norm_weight") for name in names),
        grouped_experts=any(re.search(r"\.experts\.linear_fc1\.weight\d+$", name) for name in names),
    )
    embedding = next(
        (chunk[_EMBEDDING] for each in contents.values() for chunk in each.chunks.values() if _EMBEDDING in chunk), None
    )
    if embedding is None or embedding.dim() != 2:
        raise IncompleteInputError(f"{step_folder}: no rank file holds {_EMBEDDING} as a matrix")
    etp = _expert_tensor_size(contents, config)
    uneven = layers if len(set(layers)) > 1 else None
    layout = ParallelLayout(tp=sizes["tp"], pp=sizes["pp"], vpp=sizes["vpp"], ep=sizes["ep"], etp=etp, pp_layout=uneven)
    return layout, naming, embedding.shape[0] * layout.tp


def _sizes_of_names(contents: Mapping[str, RankContent]) -> dict[str, int]:
    counts = {len(content.ranks) for content in contents.values()}
    if len(counts) != 1:
        raise MismatchError(
            f"rank folders are named in different ways: {listing(sorted(contents))}; are they of one run?"
        )
    tensor, *others = (1 + max(numbers) for numbers in zip(*(each.ranks for each in contents.values()), strict=True))
    chunks = {tuple(sorted(content.chunks, key=_chunk_number)) for content in contents.values()}
    sizes = {"tp": tensor, "pp": 1, "vpp": max(map(len, chunks)), "ep": 1}
    if len(others) == 2:
        sizes |= {"pp": others[0], "ep": others[1]}
    elif others:
        # The one number may be either. The embedding is in the first pipeline stage only, and in every expert rank.
        has_embedding = [any(_EMBEDDING in chunk for chunk in each.chunks.values()) for each in contents.values()]
        sizes["ep" if all(has_embedding) else "pp"] = others[0]
    return sizes


def _chunk_number(key: str) -> int:
    return int(key.removeprefix("model") or 0)


_ARGUMENTS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
}


def _compare_sizes(step_folder: Path, found: dict[str, int], arguments: argparse.Namespace) -> dict[str, int]:
    """Return the sizes in the arguments, which say more than the files where files are missing."""
    said = {key: getattr(arguments, name, None) or found[key] for key, name in _ARGUMENTS.items()}
    wrong = [key for key, size in said.items() if not isinstance(size, int) or found[key] > size]
    if wrong or (said["vpp"] != found["vpp"]):
        both = "; ".join(f"{key}: arguments {said[key]}, files {found[key]}" for key in said if said[key] != found[key])
        raise MismatchError(f"{step_folder}: the rank files are not those of the run their arguments describe ({both})")
    return said


def _layers_per_stage(
    step_folder: Path, contents: Mapping[str, RankContent], sizes: Mapping[str, int], config: QwenConfig
) -> tuple[int, ...]:
    """Return the layers of each stage, in model order, counted in the files."""
    counts: dict[int, set[int]] = defaultdict(set)
    for content in contents.values():
        pipeline_rank = content.ranks[1] if sizes["pp"] > 1 else 0
        for number, key in enumerate(sorted(content.chunks, key=_chunk_number)):
            layers = {int(match.group(1)) for name in content.chunks[key] if (match := _LAYER.match(name))}
            counts[number * sizes["pp"] + pipeline_rank].add(1 + max(layers, default=-1))
    if sizes["pp"] * sizes["vpp"] > config.num_hidden_layers:
        raise MismatchError(
            f"{step_folder}: the rank files are those of {sizes['pp']} x {sizes['vpp']} pipeline stages, "
            f"num_hidden_layers is {config.num_hidden_layers}"
        )
    stages = range(sizes["pp"] * sizes["vpp"])
    missing = sorted({stage % sizes["pp"] for stage in stages if stage not in counts})
    if missing:
        raise IncompleteInputError(
            f"{step_folder}: no rank file of pipeline rank {listing(list(map(str, missing)))} of {sizes['pp']}; there "
            f"are {', '.join(contents)}"
        )
    unequal = [stage for stage in stages if len(counts[stage]) > 1]
    layers_of = tuple(max(counts[stage]) for stage in stages)
    if unequal or sum(layers_of) != config.num_hidden_layers:
        hint = f"; the rank files of stage {unequal[0]} disagree: {sorted(counts[unequal[0]])}" if unequal else ""
        raise MismatchError(
            f"{step_folder}: num_hidden_layers: expected {config.num_hidden_layers}, the stages hold {layers_of}, "
            f"together {sum(layers_of)}{hint}"
        )
    return layers_of


def _expert_tensor_size(contents: Mapping[str, RankContent], config: QwenConfig) -> int | None:
    """Return etp, which the width of an expert's second matrix tells; None if no file holds an expert."""
    for content in contents.values():
        for chunk in content.chunks.values():
            for name, tensor in chunk.items():
                if _EXPERT_OUTPUT.search(name) and tensor.dim() == 2 and tensor.shape[1]:
                    return max(1, config.moe_intermediate_size // tensor.shape[1])
    return None


def check_contents(step_folder: Path, contents: Mapping[str, RankContent], expected: Sequence[RankFile]) -> None:
    """Check that every rank file that is there holds the tensors it must, and no others.

    Raises:
        MismatchError: lists all differences, one line per kind of tensor.
    """
    folders = {file.folder for file in expected}
    problems = [f"{name}: no rank of this layout" for name in contents if name not in folders]
    findings: dict[str, list[str]] = defaultdict(list)
    for file in expected:
        if file.folder in contents:
            content = contents[file.folder]
            for chunk in file.chunks:
                for name, problem in _differences(chunk, content.chunks.get(chunk.key, {})):
                    findings[f"{_NUMBER.sub('*', name)}: {problem}"].append(f"{file.folder} {chunk.key}: {name}")
    problems += [f"{kind} ({len(places)} times, first in {places[0]})" for kind, places in findings.items()]
    if problems:
        raise MismatchError(
            f"{step_folder}: the rank files do not hold the configured model ({len(problems)} findings):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def _differences(chunk: ModelChunk, found: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    wanted = {tensor.name: tensor for tensor in chunk.tensors}
    for name in sorted(wanted.keys() - found.keys()):
        yield name, f"missing, expected {wanted[name].shape}"
    for name in sorted(found.keys() - wanted.keys()):
        yield name, f"not a tensor of this model, shape {tuple(found[name].shape)}"
    for name in sorted(wanted.keys() & found.keys()):
        tensor = found[name]
        if tuple(tensor.shape) != wanted[name].shape:
            yield name, f"shape {tuple(tensor.shape)}, expected {wanted[name].shape}"
        if tensor.dtype not in FLOATS:
            yield name, f"{tensor.dtype}, expected a floating type of 16 bits or more"
