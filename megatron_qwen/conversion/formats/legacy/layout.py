"""What each rank file of a per-rank (`--ckpt-format torch`) checkpoint holds: integers and strings only.

Megatron-LM writes one folder per combination of tensor, pipeline and expert rank that occurs among its ranks
(`get_checkpoint_name` in megatron/training/checkpointing.py):

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

TT is the rank in the dense tensor-parallel group, whatever the experts' own tensor-parallel size; PPP is there for
pp > 1, EEE for ep > 1. A file holds `model`, or `model0`, `model1`, ... with virtual stages, and in each the state
dict of one GPTModel: layers and experts counted from the first that the rank holds, each tensor cut to the rank's
shard. Ranks lie in megatron-core's order tp-cp-ep-dp-pp, so rank q of a pipeline stage is tensor rank q % tp, expert
tensor rank q % etp and expert rank (q // etp) % ep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_qwen.conversion.names import EXTRA_STATE_MODULES, MEGATRON_LAYER
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard, parameters, tied_output
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout, check_layout

RANK_FILE = "model_optim_rng.pt"


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Which of Megatron's names a model's parameters have.

    Attributes:
        fused_norms: Transformer Engine's, `linear_qkv.layer_norm_weight`; else the local spec's `input_layernorm`.
        grouped_experts: Transformer Engine's `experts.linear_fc1.weight3`; else `experts.local_experts.3.linear_fc1`.
    """

    fused_norms: bool = False
    grouped_experts: bool = False


LOCAL = Naming()
TRANSFORMER_ENGINE = Naming(fused_norms=True, grouped_experts=True)
NAMINGS: Mapping[str, Naming] = {"local": LOCAL, "transformer_engine": TRANSFORMER_ENGINE}


@dataclass(frozen=True, kw_only=True)
class LocalTensor:
    """One tensor of a chunk's state dict.

    Attributes:
        name: key in the state dict.
        parameter: which it is a shard of; for the tied output copy of the last stage, the embedding.
        shard: which part along the family's shard axis; WHOLE if every tensor rank holds all of it.
        shape: of the shard; a vocabulary's with its padding rows.
        vocabulary_rows: rows of the whole vocabulary matrix with padding; None for any other parameter.
    """

    name: str
    parameter: Parameter
    shard: Shard
    shape: tuple[int, ...]
    vocabulary_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelChunk:
    """One GPTModel of a rank.

    Attributes:
        key: "model", or "model0", ... with virtual stages.
        layers: decoder layers of the whole model in it.
        tensors: in the order of the model's `named_parameters()`, which its optimizer follows.
        extra_states: `_extra_state` keys of its linear layers, which strict loading may ask for; the value is None.
    """

    key: str
    layers: range
    tensors: tuple[LocalTensor, ...]
    extra_states: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RankFile:
    """One rank file.

    Attributes:
        folder: such as "mp_rank_01_000".
        tensor_rank, pipeline_rank, expert_rank: of the ranks that share it.
        expert_tensor_rank: theirs within an expert.
        chunks: the models in it, first stage first.
    """

    folder: str
    tensor_rank: int
    pipeline_rank: int
    expert_rank: int
    expert_tensor_rank: int
    chunks: tuple[ModelChunk, ...]


def check_legacy_layout(config: QwenConfig, layout: ParallelLayout) -> None:
    """Check that the model can be cut so, and that file names can tell the ranks apart.

    Raises:
        ConfigError: every violation.
    """
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "ep", "etp")}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size is not None and size < 1]
    if wrong:
        raise ConfigError(f"parallel layout: got {', '.join(wrong)}, expected sizes from 1")
    shape = replace(config.shape(), vocab_size=vocabulary_rows(config, layout))
    world = smallest_world(layout)
    # Whether the schedule overlaps its sends is a matter of the run that loads the files.
    check_layout(replace(layout, dp=None), shape, world_size=world, overlap_p2p=layout.vpp > 1)
    etp = layout.expert_tensor_parallel_size
    if config.is_moe and layout.tp % etp:
        raise ConfigError(
            f"parallel layout: etp={etp} does not divide tp={layout.tp}. Per-rank files are named by tensor and expert "
            "rank, and ranks with different parts of an expert would share a file; use --ckpt-format torch_dist, or an "
            f"etp that divides tp"
        )


def smallest_world(layout: ParallelLayout) -> int:
    """Return the fewest ranks that the layout can run on, with every combination of its ranks among them."""
    experts = layout.expert_tensor_parallel_size * layout.ep
    return math.lcm(layout.tp * layout.cp, experts) * layout.pp


def vocabulary_rows(config: QwenConfig, layout: ParallelLayout) -> int:
    """Return the rows of the vocabulary matrices: vocab_size, rounded up to a multiple of the tensor-parallel size."""
    return -(-config.vocab_size // layout.tp) * layout.tp


def folder_name(layout: ParallelLayout, tensor_rank: int, pipeline_rank: int, expert_rank: int) -> str:
    """Return the name of a rank's folder, by Megatron-LM's `get_checkpoint_name`."""
    name = f"mp_rank_{tensor_rank:02d}"
    if layout.pp > 1:
        name += f"_{pipeline_rank:03d}"
    return f"{name}_{expert_rank:03d}" if layout.ep > 1 else name


def rank_files(
    config: QwenConfig, layout: ParallelLayout, naming: Naming = LOCAL, *, padded_rows: int | None = None
) -> tuple[RankFile, ...]:
    """Return every rank file of a checkpoint, in the order of the names.

    With etp < tp not every pair of tensor and expert rank occurs; dense parameters are in one file per expert rank
    that goes with the tensor rank, experts in one file per tensor rank that goes with them.

    Args:
        config: the model.
        layout: checked here.
        naming: of the parameters.
        padded_rows: rows of the vocabulary with padding, where they are not `vocabulary_rows(config, layout)`.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    check_legacy_layout(config, layout)
    rows = padded_rows or vocabulary_rows(config, layout)
    by_layer: dict[int | None, list[Parameter]] = {}
    for parameter in parameters(config):
        by_layer.setdefault(parameter.layer, []).append(parameter)
    stages = _stages(config, layout)
    files = {}
    for pipeline_rank in range(layout.pp):
        for tensor_rank, expert_rank, expert_tensor_rank in sorted(_places(layout)):
            cut = _Cut(config, layout, naming, rows, tensor_rank, expert_rank, expert_tensor_rank)
            chunks = tuple(
                _chunk(cut, by_layer, stages, pipeline_rank, virtual_stage) for virtual_stage in range(layout.vpp)
            )
            folder = folder_name(layout, tensor_rank, pipeline_rank, expert_rank)
            files[folder] = RankFile(
                folder=folder,
                tensor_rank=tensor_rank,
                pipeline_rank=pipeline_rank,
                expert_rank=expert_rank,
                expert_tensor_rank=expert_tensor_rank,
                chunks=chunks,
            )
    return tuple(files[folder] for folder in sorted(files))


def _places(layout: ParallelLayout) -> set[tuple[int, int, int]]:
    """Return the (tensor, expert, expert tensor) ranks that occur in a pipeline stage."""
    etp = layout.expert_tensor_parallel_size
    step = math.lcm(layout.tp, etp * layout.ep)
    return {(q % layout.tp, q // etp % layout.ep, q % etp) for q in range(step)}


def _stages(config: QwenConfig, layout: ParallelLayout) -> tuple[range, ...]:
    stages, start = [], 0
    for count in layout.layers_per_stage(config.num_hidden_layers):
        stages.append(range(start, start + count))
        start += count
    return tuple(stages)


@dataclass(frozen=True)
class _Cut:
    """One rank's share of each parameter."""

    config: QwenConfig
    layout: ParallelLayout
    naming: Naming
    vocabulary_rows: int
    tensor_rank: int
    expert_rank: int
    expert_tensor_rank: int

    @property
    def experts(self) -> range:
        """The experts of each MoE layer that the rank holds."""
        count = self.config.num_experts // self.layout.ep
        return range(self.expert_rank * count, (self.expert_rank + 1) * count)

    def holds(self, parameter: Parameter) -> bool:
        return parameter.expert is None or parameter.expert in self.experts

    def tensor(self, parameter: Parameter, first_layer: int, name: str | None = None) -> LocalTensor:
        """Return the rank's shard; `name` if it is not the parameter's own."""
        axis = parameter.family.shard_axis
        shard = WHOLE if axis is None else self._shard(parameter)
        shape = list(parameter.shape)
        rows = self.vocabulary_rows if parameter.has_vocabulary_rows else None
        if rows is not None:
            shape[0] = rows
        if axis is not None:
            shape[axis] //= shard.size
        return LocalTensor(
            name=name or self._name(parameter, first_layer),
            parameter=parameter,
            shard=shard,
            shape=tuple(shape),
            vocabulary_rows=rows,
        )

    def _shard(self, parameter: Parameter) -> Shard:
        if parameter.expert is None:
            return Shard(rank=self.tensor_rank, size=self.layout.tp)
        return Shard(rank=self.expert_tensor_rank, size=self.layout.expert_tensor_parallel_size)

    def _name(self, parameter: Parameter, first_layer: int) -> str:
        relative = relative_name(parameter, self.naming)
        if parameter.expert is not None:
            relative = relative.format(expert=parameter.expert - self.experts.start)
        if parameter.layer is None:
            return relative
        return MEGATRON_LAYER.format(layer=parameter.layer - first_layer) + relative


def relative_name(parameter: Parameter, naming: Naming) -> str:
    """Return the parameter's name within its layer; `{expert}` stands for the expert's number."""
    family = parameter.family
    has_engine_name = naming.grouped_experts if family.is_expert else naming.fused_norms
    return (family.engine if has_engine_name else "") or family.megatron


# The modules of a GPTModel and of a layer in the order in which they are made, which is that of the parameters.
_MODULES = (
    "embedding",
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "pre_mlp_layernorm",
    "mlp.router",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.experts",
    "mlp.shared_experts.gate_weight",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
    "decoder.final_layernorm",
    "output_layer",
)
_LEAVES = ("layer_norm_weight", "weight", "bias")


def _position(parameter: Parameter, naming: Naming) -> tuple[int, int, int, int]:
    """Return where a parameter comes among those of its layer."""
    name = relative_name(parameter, naming)
    module = next(i for i, module in enumerate(_MODULES) if name.startswith(module))
    if parameter.expert is not None:
        order = (int("linear_fc2" in name), parameter.expert)
        return (module, *(order if naming.grouped_experts else order[::-1]), 0)
    leaf = name.rpartition(".")[2]
    return module, _LEAVES.index(leaf) if leaf in _LEAVES else 0, 0, 0


def _chunk(
    cut: _Cut,
    by_layer: dict[int | None, list[Parameter]],
    stages: tuple[range, ...],
    pipeline_rank: int,
    virtual_stage: int,
) -> ModelChunk:
    stage = virtual_stage * cut.layout.pp + pipeline_rank
    layers, is_last = stages[stage], stage == len(stages) - 1
    embedding, *rest = by_layer[None]
    tensors = [cut.tensor(embedding, 0)] if stage == 0 else []
    for layer in layers:
        held = sorted(filter(cut.holds, by_layer[layer]), key=lambda each: _position(each, cut.naming))
        tensors += [cut.tensor(parameter, layers.start) for parameter in held]
    if is_last:
        tensors += [cut.tensor(parameter, 0) for parameter in rest]
        if cut.config.tie_word_embeddings and stage > 0:
            tensors.append(cut.tensor(embedding, 0, tied_output(cut.config).megatron_name))
    extra_states = list(dict.fromkeys(_extra_states(tensors)))
    if is_last:
        extra_states.append("output_layer._extra_state")
    key = f"model{virtual_stage}" if cut.layout.vpp > 1 else "model"
    return ModelChunk(key=key, layers=layers, tensors=tuple(tensors), extra_states=tuple(extra_states))


def _extra_states(tensors: list[LocalTensor]) -> Iterator[str]:
    for tensor in tensors:
        module = tensor.name.rpartition(".")[0]
        if module.rpartition(".")[2] in EXTRA_STATE_MODULES:
            yield f"{module}._extra_state"
