"""Says in words what is wrong with a module's weights: heads, halves, experts or layers exchanged, or a tensor zeroed.

Used where a comparison has already named the module (divergence.py). Parts are recognised by their bits, after both
sides are rounded to the coarser of the two dtypes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.names import MEGATRON_LAYER
from megatron_qwen.conversion.parameters import Parameter, parameters
from megatron_qwen.model.config import QwenConfig

# Fields of config.json that a module without weights of its own, or beside its weights, computes with.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("rms_norm_eps",),
    "pre_mlp_layernorm": ("rms_norm_eps",),
    "decoder.final_layernorm": ("rms_norm_eps",),
    "self_attention.rotary_pos_emb": ("rope_theta", "rope_scaling"),
    "self_attention.core_attention": ("rope_theta", "rope_scaling"),
    "self_attention": ("rope_theta", "rope_scaling"),
    "mlp.router.routing": ("norm_topk_prob", "num_experts_per_tok"),
    "mlp": ("norm_topk_prob",),
}
_PARTS = {
    "q_proj": ("q head", "num_attention_heads"),
    "k_proj": ("k head", "num_key_value_heads"),
    "v_proj": ("v head", "num_key_value_heads"),
}
_SMALL = ("input_layernorm.weight", "pre_mlp_layernorm.weight", "self_attention.linear_qkv.bias")


def explain(module: str, layer: int | None, a: WeightSource, b: WeightSource) -> str:
    """Return what distinguishes B's module from A's, or an empty string.

    Args:
        module: as `layer_trace` names it, or a module outside the layers by its full name.
        layer: the decoder layer; None outside.
        a: source of the expected weights.
        b: source of the weights under test; of the same shapes.
    """
    notes = [
        f"config.{name}: {getattr(a.config, name)} and {getattr(b.config, name)}"
        for name in _FIELDS.get(module, ())
        if getattr(a.config, name) != getattr(b.config, name)
    ]
    mine, theirs = (_parameters_of(module, layer, source.config) for source in (a, b))
    if ".local_experts." in module and layer is not None:
        notes += _exchanged_experts(module, layer, a, b)
    elif module in ("self_attention", "self_attention.linear_qkv"):
        notes += _exchanged_heads(mine, theirs, a, b)
    if not notes:
        notes = [note for x, y in zip(mine, theirs, strict=True) for note in _explain_parameter(x, y, a, b)]
    return "; ".join(notes)


def moved_layers(a: WeightSource, b: WeightSource) -> dict[int, int]:
    """Return for layers of B whose norms and biases are bit for bit those of another layer of A: which one."""
    marks = [_layer_marks(source) for source in (a, b)]
    by_mark = {mark: layer for layer, mark in marks[0].items()}
    return {
        layer: by_mark[mark]
        for layer, mark in marks[1].items()
        if by_mark.get(mark, layer) != layer and marks[0].get(layer) != mark
    }


def _layer_marks(source: WeightSource) -> dict[int, bytes]:
    digests: dict[int, list[bytes]] = {}
    for parameter in parameters(source.config):
        if parameter.layer is not None and parameter.family.megatron in _SMALL:
            digests.setdefault(parameter.layer, []).append(_mark(source.read(parameter).float()))
    return {layer: b"".join(parts) for layer, parts in digests.items()}


def _parameters_of(module: str, layer: int | None, config: QwenConfig) -> list[Parameter]:
    full = module if layer is None else MEGATRON_LAYER.format(layer=layer) + module
    full = full.replace(".router.gating", ".router")
    return [
        item
        for item in parameters(config)
        if item.layer == layer and (item.megatron_name == full or item.megatron_name.startswith(full + "."))
    ]


def _exchanged_heads(
    mine: Sequence[Parameter], theirs: Sequence[Parameter], a: WeightSource, b: WeightSource
) -> list[str]:
    """Recognise B's heads among A's, for weights and biases."""
    notes: dict[str, list[str]] = {}
    pairs_of_qkv = [pair for pair in zip(mine, theirs, strict=True) if pair[0].family.transform == "qkv"]
    for x, y in pairs_of_qkv:
        kind = x.family.megatron.rpartition(".")[2]
        pairs = list(_same_dtype(a.hf_tensors(x), b.hf_tensors(y)))
        heads_a = _heads([left for left, _ in pairs], x, a.config)
        heads_b = _heads([right for _, right in pairs], y, b.config)
        for note in _describe(_moves(heads_a, heads_b)):
            notes.setdefault(note, []).append(kind)
    return [note if len(kinds) == len(pairs_of_qkv) else f"{note} ({kinds[0]} only)" for note, kinds in notes.items()]


def _heads(tensors: Sequence[Tensor], parameter: Parameter, config: QwenConfig) -> dict[str, bytes]:
    heads = {}
    for name, tensor in zip(parameter.hf_names, tensors, strict=True):
        label, field = _PARTS[name.split(".")[-2]]
        for number, head in enumerate(tensor.chunk(getattr(config, field))):
            heads[f"{label} {number}"] = _mark(head)
    return heads


def _exchanged_experts(module: str, layer: int, a: WeightSource, b: WeightSource) -> list[str]:
    matrix = module.rpartition(".")[2]
    marks: list[dict[str, bytes]] = [{}, {}]
    for item in parameters(a.config):
        if item.layer == layer and item.expert is not None and item.megatron_name.endswith(f".{matrix}.weight"):
            ((x, y),) = _same_dtype((a.read(item),), (b.read(item),))
            label = f"expert {item.expert}"
            marks[0][label], marks[1][label] = _mark(x), _mark(y)
    own = f"expert {module.split('.')[-2]}"
    return _describe({label: origin for label, origin in _moves(*marks).items() if own in (label, origin)})


def _moves(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> dict[str, str]:
    """Return the labels of B that carry what A has under another label, with that label."""
    places = {mark: label for label, mark in a.items()}
    return {label: places[mark] for label, mark in b.items() if a[label] != mark and mark in places}


def _describe(moved: Mapping[str, str]) -> list[str]:
    notes = []
    done: set[str] = set()
    for label, origin in moved.items():
        if label in done:
            continue
        if moved.get(origin) == label:
            done |= {label, origin}
            kind, _, number = label.rpartition(" ")
            other_kind, _, other = origin.rpartition(" ")
            both = f"{kind}s {number} and {other}" if kind == other_kind else f"{label} and {origin}"
            notes.append(f"{both} exchanged")
        else:
            notes.append(f"{label} holds A's {origin}")
    return notes


def _explain_parameter(x: Parameter, y: Parameter, a: WeightSource, b: WeightSource) -> Iterator[str]:
    """Say what is wrong with the Hugging Face tensors of one parameter."""
    pairs = list(_same_dtype(a.hf_tensors(x), b.hf_tensors(y)))
    if len(pairs) == 2 and all(_mark(pairs[i][1]) == _mark(pairs[1 - i][0]) for i in (0, 1)):
        if _mark(pairs[0][0]) != _mark(pairs[1][0]):
            yield "gate and up exchanged"
        return
    for name, (left, right) in zip(x.hf_names, pairs, strict=True):
        if left.shape != right.shape:
            yield f"{name}: shape {tuple(left.shape)} and {tuple(right.shape)}"
        elif _mark(left) != _mark(right):
            yield f"{name}: {_describe_values(left, right)}"


def _describe_values(a: Tensor, b: Tensor) -> str:
    zero = [not bool(tensor.any()) for tensor in (a, b)]
    if any(zero):
        return "zero in A" if zero[0] else "zero in B"
    if a.dim() == 2 and a.shape[0] == a.shape[1] and torch.equal(a, b.T):
        return "transposed"
    if a.dim() == 2:
        rows_a, rows_b = ({f"row {i}": _mark(row) for i, row in enumerate(each)} for each in (a, b))
        moves = _describe(_moves(rows_a, rows_b))
        if moves:
            return ", ".join(moves[:3]) + (f" and {len(moves) - 3} more" if len(moves) > 3 else "")
    different = a != b
    rows = int(different.flatten(1).any(dim=1).sum()) if a.dim() > 1 else int(different.sum())
    unit = "rows" if a.dim() > 1 else "values"
    return f"{rows:,} of {a.shape[0]:,} {unit} differ, max |A-B| {float((a.float() - b.float()).abs().max()):.3g}"


def _same_dtype(a: Sequence[Tensor], b: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in zip(a, b, strict=True):
        dtype = min((x.dtype, y.dtype), key=lambda each: torch.finfo(each).bits)
        yield x.to(dtype), y.to(dtype)


def _mark(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).digest()
