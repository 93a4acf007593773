"""Proof before action: from headers and configuration alone, sources and targets fit one to one, or all faults at once.

    plan_import(config, entries, where=..., dtype=None)      # a Hugging Face folder's tensors
    plan_export(config, stored, where=..., dtype=None)       # a torch_dist checkpoint's tensors

A plan lists every parameter with the dtype it will have. Nothing here reads a weight.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_qwen.checkpoint.safetensors_header import TensorEntry
from megatron_qwen.conversion.names import EMBEDDING_NAME, OUTPUT_NAME, SYMBOL_FIELDS
from megatron_qwen.conversion.parameters import (
    Parameter,
    StoredPlace,
    is_homogeneous,
    parameters,
    stored_names,
    stored_place,
    symbol_sizes,
    tied_output,
)
from megatron_qwen.errors import MismatchError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.strict_json import listing

FLOAT_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PlannedParameter:
    """One parameter with its dtypes at both ends, and the place that a torch_dist checkpoint of it gives it."""

    parameter: Parameter
    source_dtype: torch.dtype
    target_dtype: torch.dtype
    place: StoredPlace

    @property
    def target_bytes(self) -> int:
        """Size of the parameter after the conversion."""
        return self.num_elements * self.target_dtype.itemsize

    @property
    def num_elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.parameter.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion will do.

    Attributes:
        config: the model as it will be described at the target (its dtype included).
        parameters: everything that is converted, in the model's order.
        has_equal_output: a tied model whose source holds an `lm_head.weight` or `output_layer.weight` all the same, to
            be proved equal to the embedding and left out.
        notes: what a user should know; one line each.
    """

    config: QwenConfig
    parameters: tuple[PlannedParameter, ...]
    has_equal_output: bool
    notes: tuple[str, ...]

    @property
    def target_bytes(self) -> int:
        """Bytes of weights at the target."""
        return sum(item.target_bytes for item in self.parameters)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Header of one global tensor in a torch_dist checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def plan_import(
    config: QwenConfig, entries: Mapping[str, TensorEntry], *, where: str, dtype: torch.dtype | None = None
) -> ConversionPlan:
    """Plan Hugging Face to Megatron.

    Args:
        config: from config.json.
        entries: from the headers.
        where: the folder, for messages.
        dtype: of the target; None keeps that of each tensor.

    Raises:
        MismatchError: config.json and weights contradict each other; the message lists everything found.
    """
    wanted = parameters(config)
    shapes = {name: shape for item in wanted for name, shape in zip(item.hf_names, item.hf_shapes, strict=True)}
    has_equal_output = config.tie_word_embeddings and OUTPUT_NAME in entries
    if has_equal_output:
        shapes[OUTPUT_NAME] = shapes[EMBEDDING_NAME]
    problems = [
        *_layer_problems(config, entries),
        *_missing_problems(wanted, shapes.keys() - entries.keys()),
        *_surplus_problems(entries.keys() - shapes.keys()),
        *_size_problems(config, wanted, entries),
        *_dtype_problems(config, entries, dtype),
    ]
    if problems:
        raise MismatchError(_report(f"{where}: config.json and the weights contradict each other", problems))
    source = {item: FLOAT_DTYPES.get(entries[item.hf_names[0]].dtype, torch.float64) for item in wanted}
    return _finish(config, wanted, source, dtype, has_equal_output)


def plan_export(
    config: QwenConfig, stored: Mapping[str, StoredTensor], *, where: str, dtype: torch.dtype | None = None
) -> ConversionPlan:
    """Plan Megatron to Hugging Face.

    Args:
        config: of the model in the checkpoint.
        stored: every weight tensor of the checkpoint by key (optimizer state left out).
        where: the folder, for messages.
        dtype: of the target; None keeps that of each tensor.

    Raises:
        MismatchError: the checkpoint does not hold this model; the message lists everything found.
    """
    wanted = parameters(config)
    places = find_places(config, stored)
    output = tied_output(config)
    output_key = stored_place(output, config, stacked=False).key
    has_equal_output = config.tie_word_embeddings and output_key in stored
    used = {place.key for place in places.values() if place} | ({output_key} if has_equal_output else set())
    problems = [
        *_missing_problems(wanted, {item.hf_names[0] for item in wanted if places[item] is None}),
        *(f"{key}: no parameter of this model" for key in sorted(stored.keys() - used)),
        *_stored_shape_problems(config, places, stored),
    ]
    if problems:
        raise MismatchError(_report(f"{where}: the checkpoint and the model's config.json differ", problems))
    source = {item: stored[place.key].dtype for item, place in places.items() if place}
    return _finish(config, wanted, source, dtype, has_equal_output)


def find_places(config: QwenConfig, stored: Collection[str]) -> dict[Parameter, StoredPlace | None]:
    """Return where a checkpoint with these keys holds each parameter; None where it does not.

    Layers may be stacked or named one by one, norms named as the local spec or as Transformer Engine's stores them.
    """
    places: dict[Parameter, StoredPlace | None] = {}
    for parameter in parameters(config):
        candidates = (
            stored_place(parameter, config, stacked=stacked, name=name)
            for stacked in (True, False)
            for name in stored_names(parameter.family)
        )
        places[parameter] = next((place for place in candidates if place.key in stored), None)
    return places


def _finish(
    config: QwenConfig,
    wanted: Sequence[Parameter],
    source: Mapping[Parameter, torch.dtype],
    dtype: torch.dtype | None,
    has_equal_output: bool,
) -> ConversionPlan:
    stacked = is_homogeneous(config)
    items = tuple(
        PlannedParameter(
            parameter=item,
            source_dtype=source[item],
            target_dtype=dtype or source[item],
            place=stored_place(item, config, stacked=stacked),
        )
        for item in wanted
    )
    notes = []
    (main_dtype, _), *others = Counter(item.target_dtype for item in items).most_common()
    name = str(main_dtype).removeprefix("torch.")
    if others:
        notes.append(f"dtypes are mixed: mostly {name}, {sum(count for _, count in others)} parameters differ")
    if name != config.torch_dtype:
        notes.append(
            f"config.json says {config.torch_dtype}, the converted weights are {name}; it is written as {name}"
        )
    if has_equal_output:
        notes.append("the embeddings are tied: the output matrix is compared with them and left out")
    written = replace(config, torch_dtype=name)
    return ConversionPlan(config=written, parameters=items, has_equal_output=has_equal_output, notes=tuple(notes))


_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_NUMBER = re.compile(r"(?<=\.layers\.)\d+|(?<=\.experts\.)\d+")


def _layer_problems(config: QwenConfig, entries: Iterable[str]) -> Iterable[str]:
    found = {int(match.group(1)) for name in entries if (match := _LAYER.match(name))}
    if found != set(range(config.num_hidden_layers)):
        numbers = f"0 to {max(found)}" if found == set(range(len(found))) and found else f"{sorted(found)[:20]}"
        yield f"num_hidden_layers: config.json says {config.num_hidden_layers}, weights have {len(found)} ({numbers})"


def _missing_problems(wanted: Sequence[Parameter], missing: Collection[str]) -> Iterable[str]:
    """One line per family: what is absent and how often."""
    for pattern, names in _by_pattern(name for item in wanted for name in item.hf_names if name in missing).items():
        hint = ""
        if pattern.endswith("_proj.bias"):
            hint = "; Qwen2 has biases on q, k and v, so this may be another family (Llama)"
        elif pattern == OUTPUT_NAME:
            hint = "; if the output shares the embedding, tie_word_embeddings must be true"
        yield f"{pattern}: missing{_times(names)}{hint}"


def _surplus_problems(surplus: Collection[str]) -> Iterable[str]:
    for pattern, names in _by_pattern(sorted(surplus)).items():
        hint = ""
        if "q_norm" in pattern or "k_norm" in pattern:
            hint = "; norms of q and k belong to Qwen3"
        elif pattern.endswith(("qweight", "qzeros", "scales", "g_idx", "weight_scale_inv")):
            hint = "; quantized weights are not supported, start from the unquantized model"
        yield f"{pattern}: not a tensor of this model{_times(names)}{hint}"


def _by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_NUMBER.sub("*", name)].append(name)
    return groups


def _times(names: Sequence[str]) -> str:
    return f" ({len(names)} times, first {names[0]})" if len(names) > 1 or "*" in _NUMBER.sub("*", names[0]) else ""


def _size_problems(
    config: QwenConfig, wanted: Sequence[Parameter], entries: Mapping[str, TensorEntry]
) -> Iterable[str]:
    """One line per field of config.json that the shapes contradict, or per family where no field explains it."""
    sizes = symbol_sizes(config)
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in wanted:
        for name, shape, symbols in zip(item.hf_names, item.hf_shapes, item.family.hf_shapes, strict=True):
            entry = entries.get(name)
            if entry is None or entry.shape == shape:
                continue
            if len(entry.shape) != len(shape):
                found[_NUMBER.sub("*", name), f"expected {shape}, found {entry.shape}"].append(name)
                continue
            for symbol, actual in zip(symbols.split(), entry.shape, strict=True):
                if actual != sizes[symbol]:
                    found[SYMBOL_FIELDS[symbol], _difference(config, symbol, sizes[symbol], actual)].append(name)
    for (field, text), names in found.items():
        example = entries[names[0]]
        yield f"{field}: {text} ({len(names)} tensors, first {names[0]} {example.shape} in {example.file.name})"


def _difference(config: QwenConfig, symbol: str, expected: int, actual: int) -> str:
    if symbol in ("q", "kv"):
        heads = config.num_attention_heads if symbol == "q" else config.num_key_value_heads
        return f"config.json says {heads} heads of {config.head_dim} = {expected} rows, the weights have {actual}"
    return f"config.json says {expected}, the weights have {actual}"


def _dtype_problems(config: QwenConfig, entries: Mapping[str, TensorEntry], dtype: torch.dtype | None) -> Iterable[str]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, entry in entries.items():
        kinds[entry.dtype].append(name)
    for kind, names in kinds.items():
        if kind == "F64" and dtype is not None:
            continue
        if kind not in FLOAT_DTYPES:
            hint = "give --dtype to convert it" if kind == "F64" else "quantized or integer weights are not supported"
            yield f"dtype {kind}: {len(names)} tensors, first {names[0]}; config.json says {config.torch_dtype}; {hint}"
    if dtype is not None:
        return
    for item in parameters(config):
        mixed = sorted({entries[name].dtype for name in item.hf_names if name in entries})
        if len(mixed) > 1:
            merged = ", ".join(item.hf_names)
            yield f"{merged}: differ in dtype ({listing(mixed)}), but Megatron merges them; give --dtype"
    if not is_homogeneous(config):
        return
    for pattern, group in _by_pattern(entries).items():
        mixed = sorted({entries[name].dtype for name in group})
        if len(mixed) > 1:
            yield f"{pattern}: layers differ in dtype ({listing(mixed)}), but a checkpoint stacks them; give --dtype"


def _stored_shape_problems(
    config: QwenConfig, places: Mapping[Parameter, StoredPlace | None], stored: Mapping[str, StoredTensor]
) -> Iterable[str]:
    seen: set[str] = set()
    for item, place in places.items():
        if place is None or place.key in seen:
            continue
        seen.add(place.key)
        expected, actual = (*place.leading, *item.shape), stored[place.key].shape
        padded = item.has_vocabulary_rows and actual[1:] == expected[1:] and actual[0] >= expected[0]
        if actual != expected and not padded:
            symbols = (*("num_hidden_layers", "num_experts")[: len(place.leading)], *item.family.shape.split())
            fields = [
                SYMBOL_FIELDS.get(symbol, symbol)
                for symbol, want, have in zip(symbols, expected, actual, strict=False)
                if want != have
            ]
            hint = f" ({', '.join(dict.fromkeys(fields))})" if len(expected) == len(actual) else ""
            yield f"{place.key}: shape {actual}, expected {expected} from config.json{hint}"
        if stored[place.key].dtype not in (*FLOAT_DTYPES.values(), torch.float64):
            yield f"{place.key}: dtype {stored[place.key].dtype} is not one of {listing(list(FLOAT_DTYPES))}"


def _report(head: str, problems: Sequence[str]) -> str:
    return f"{head} ({len(problems)} findings):\n" + "\n".join(f"  - {problem}" for problem in problems)
