"""The rows of `names.py` filled in for one model: every parameter, its names, shapes and place in a checkpoint.

Integers and strings only: no torch, no model, no process group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_qwen.conversion.names import (
    EXTRA_STATE_MODULES,
    FAMILIES,
    HF_LAYER,
    MEGATRON_LAYER,
    OUTPUT_NAME,
    STACKED_LAYERS,
    VOCABULARY_AXIS,
    Family,
)
from megatron_qwen.model.config import QwenConfig


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `rank` of the `size` equal parts that tensor parallelism cuts."""

    rank: int = 0
    size: int = 1


WHOLE = Shard()


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one model: a row with its numbers filled in.

    Attributes:
        family: the row.
        layer: decoder layer counted over the whole model; None for a parameter of scope "model".
        expert: routed expert counted over the whole layer, or None.
        hf_names, hf_shapes: Hugging Face tensors in the order of the transform.
        shape: of Megatron's whole tensor.
    """

    family: Family
    layer: int | None
    expert: int | None
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]

    @property
    def megatron_name(self) -> str:
        """Name in a local-spec model, with layer and expert counted over the whole model."""
        return self._full_name(self.family.megatron)

    @property
    def engine_name(self) -> str:
        """Name in a Transformer Engine model, counted likewise."""
        return self._full_name(self.family.engine or self.family.megatron)

    @property
    def has_vocabulary_rows(self) -> bool:
        """Whether axis 0 is the vocabulary, which Megatron may pad."""
        return self.family.shape.split()[0] == VOCABULARY_AXIS

    def _full_name(self, name: str) -> str:
        prefix = "" if self.layer is None else MEGATRON_LAYER.format(layer=self.layer)
        return prefix + name.format(expert=self.expert)


@dataclass(frozen=True)
class StoredPlace:
    """Where a torch_dist checkpoint keeps a parameter: `key`, at `index` of the leading axes of sizes `leading`."""

    key: str
    index: tuple[int, ...]
    leading: tuple[int, ...]


def symbol_sizes(config: QwenConfig) -> dict[str, int]:
    """Return the size of every symbol of the table for this model."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    widths = {
        "f": config.intermediate_size,
        "e": config.moe_intermediate_size,
        "s": config.shared_expert_intermediate_size,
    }
    return {
        "V": config.vocab_size,
        "h": config.hidden_size,
        "q": queries,
        "kv": keys,
        "qkv": queries + 2 * keys,
        "E": config.num_experts,
        "1": 1,
        **widths,
        **{f"2{symbol}": 2 * width for symbol, width in widths.items()},
    }


def parameters(config: QwenConfig) -> tuple[Parameter, ...]:
    """Return every parameter of the model in the order of transformers' modules.

    A model with tied embeddings has one vocabulary matrix: its `lm_head.weight` is not among them.
    """
    return tuple(_parameters(config, symbol_sizes(config)))


def tied_output(config: QwenConfig) -> Parameter:
    """Return the parameter that Megatron's last pipeline stage holds as its copy of a tied embedding."""
    (family,) = (family for family in FAMILIES if family.hf == (OUTPUT_NAME,))
    return _fill(family, symbol_sizes(config), None, None)


def stored_place(parameter: Parameter, config: QwenConfig, *, stacked: bool, name: str | None = None) -> StoredPlace:
    """Return where a torch_dist checkpoint keeps `parameter`.

    Args:
        parameter: of `config`.
        config: the model.
        stacked: layers are stacked (homogeneous models) rather than named one by one.
        name: another relative name than the row's `stored`.
    """
    family = parameter.family
    name = name or family.stored or family.megatron
    if parameter.layer is None:
        return StoredPlace(name, (), ())
    index: tuple[int, ...] = (parameter.layer,) if stacked else ()
    leading: tuple[int, ...] = (config.num_hidden_layers,) if stacked else ()
    prefix = STACKED_LAYERS if stacked else MEGATRON_LAYER.format(layer=parameter.layer)
    if parameter.expert is not None:
        index, leading = (*index, parameter.expert), (*leading, config.num_experts)
    return StoredPlace(prefix + name, index, leading)


def stored_names(family: Family) -> tuple[str, ...]:
    """Return the relative names under which checkpoints of either spec keep a family, ours first."""
    own = family.stored or family.megatron
    return (own,) if family.is_expert else tuple(dict.fromkeys((own, family.engine or family.megatron)))


def is_homogeneous(config: QwenConfig) -> bool:
    """Whether all layers are of one kind, so that Megatron stacks them in a checkpoint."""
    return len(set(config.moe_layers())) == 1


def extra_state_keys(config: QwenConfig) -> list[str]:
    """Return the keys of the empty extra-state objects that a stock local-spec model asks a checkpoint for."""
    keys = []
    stacked = is_homogeneous(config)
    for parameter in parameters(config):
        module, _, leaf = (parameter.family.stored or parameter.family.megatron).rpartition(".")
        if leaf != "weight" or module.rpartition(".")[2] not in EXTRA_STATE_MODULES:
            continue
        place = stored_place(parameter, config, stacked=stacked)
        index, leading = place.index or (0,), place.leading or (1,)
        position = f"shard_{'.'.join(map(str, index))}_{'.'.join(map(str, leading))}"
        keys.append(f"{place.key.removesuffix('weight')}_extra_state/{position}")
    return keys


def hf_file_order(parameters: tuple[Parameter, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Return (name, shape) of all Hugging Face tensors in the order of a transformers state dict.

    It is that of the modules, a bias right after its weight; `save_pretrained` fills its shards in this order.
    """
    modules: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for parameter in parameters:
        for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True):
            modules.setdefault(name.rpartition(".")[0], []).append((name, shape))
    return [tensor for tensors in modules.values() for tensor in tensors]


_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"(?<=\.experts\.local_experts\.)(\d+)(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)(\d+)$")


def local_layer(name: str) -> int | None:
    """Return the layer's number in a parameter name of a model chunk, or None."""
    match = _LOCAL_LAYER.match(name)
    return int(match.group(1)) if match else None


def global_name(name: str, *, layer: int | None, expert_offset: int) -> str:
    """Return a model chunk's parameter name with layer and expert counted over the whole model.

    Args:
        name: as in `named_parameters()` of a GPTModel of either spec.
        layer: the layer's number in the whole model, or None outside the layers.
        expert_offset: number of the first expert that this rank holds.
    """
    if layer is not None:
        name = _LOCAL_LAYER.sub(MEGATRON_LAYER.format(layer=layer), name)
    return _LOCAL_EXPERT.sub(lambda match: str(int(match.group()) + expert_offset), name)


def _parameters(config: QwenConfig, sizes: Mapping[str, int]) -> Iterator[Parameter]:
    moe_layers = config.moe_layers()
    first_layer_row = next(i for i, family in enumerate(FAMILIES) if family.scope != "model")
    last_layer_row = max(i for i, family in enumerate(FAMILIES) if family.scope != "model")
    for family in FAMILIES[:first_layer_row]:
        yield _fill(family, sizes, None, None)
    for layer, is_moe in enumerate(moe_layers):
        present = ("layer", "moe" if is_moe else "dense")
        rows = [family for family in FAMILIES[first_layer_row : last_layer_row + 1] if family.scope in present]
        experts_at = next((i for i, family in enumerate(rows) if family.is_expert), len(rows))
        expert_rows = [family for family in rows if family.is_expert]
        for family in rows[:experts_at]:
            yield _fill(family, sizes, layer, None)
        for expert in range(config.num_experts if expert_rows else 0):
            for family in expert_rows:
                yield _fill(family, sizes, layer, expert)
        for family in rows[experts_at + len(expert_rows) :]:
            yield _fill(family, sizes, layer, None)
    for family in FAMILIES[last_layer_row + 1 :]:
        if not (config.tie_word_embeddings and family.hf == (OUTPUT_NAME,)):
            yield _fill(family, sizes, None, None)


def _fill(family: Family, sizes: Mapping[str, int], layer: int | None, expert: int | None) -> Parameter:
    prefix = "" if layer is None else HF_LAYER.format(layer=layer)
    return Parameter(
        family=family,
        layer=layer,
        expert=expert,
        hf_names=tuple(prefix + name.format(expert=expert) for name in family.hf),
        hf_shapes=tuple(_shape(symbols, sizes) for symbols in family.hf_shapes),
        shape=_shape(family.shape, sizes),
    )


def _shape(symbols: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[symbol] for symbol in symbols.split())
