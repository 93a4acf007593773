"""A Qwen MoE made from a dense checkpoint, by the recipe of Qwen2-57B-A14B (arXiv 2407.10671, section 2.2.2).

Every MLP is replicated as often as its neurons are needed, the neurons of each copy are shuffled, and experts are cut
off the row of copies, the rest dropped. Then a random half of each expert's parameters is drawn anew. The report does
not say how; here a parameter (or, by choice, a neuron) is drawn anew with that probability from a normal
distribution. The shared expert is cut from copies likewise, and keeps its values. Router and gate are normal.

Each tensor's random numbers come from a generator of its own, keyed by the seed and the tensor's name and set to the
row: the result does not depend on threads, on the order of the work, or on torch.

An `UpcycledModel` is a source like a checkpoint on disk, so writing it is a conversion like any other.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_qwen.checkpoint.safetensors_header import TensorEntry
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.conversion.options import ConversionOptions
from megatron_qwen.conversion.outputs import hf_files
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard, parameters, tied_output
from megatron_qwen.conversion.plan import ConversionPlan, plan_import
from megatron_qwen.conversion.report import ConversionReport
from megatron_qwen.conversion.rows import gather_rows, read_shard
from megatron_qwen.conversion.run import Conversion, Verb, prepare
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig

UPCYCLE = Verb("dense hf -> moe hf", True, hf_files)
UNITS = ("parameter", "neuron")
_CACHED_TENSORS = 3  # gate, up and down of the layer at hand


@dataclass(frozen=True, kw_only=True)
class UpcyclingRecipe:
    """What to make of a dense model.

    Attributes:
        num_experts: routed experts per MoE layer.
        topk: experts per token.
        expert_width: neurons of one expert.
        shared_width: neurons of the shared expert.
        reinit: share of each expert's parameters that is drawn anew, 0 to 1.
        reinit_std: of the normal distribution they are drawn from; None takes the model's initializer_range.
        reinit_unit: what is drawn anew: single values ("parameter"), or whole neurons ("neuron"): their rows of gate
            and up and their column of down, as in Drop-Upcycling (arXiv 2502.19261).
        reinit_shared: treat the shared expert like the others.
        expert_scale, shared_scale: multiply what the experts, and the shared expert, return (their down matrices).
            The recipe has 1. With a gate of 0 the shared expert counts one half: a shared_scale of 2 at the dense
            model's width makes the MoE model begin as the dense one, but for what the experts add.
        router_std, gate_std: of the router and of the shared expert's gate; None takes the model's initializer_range.
        norm_topk_prob: renormalise the chosen experts' probabilities.
        router_aux_loss_coef: of transformers' load-balancing loss.
        dense_layers: decoder layers that stay dense.
        seed: of everything random.
    """

    num_experts: int
    topk: int
    expert_width: int
    shared_width: int
    reinit: float = 0.5
    reinit_std: float | None = None
    reinit_unit: Literal["parameter", "neuron"] = "parameter"
    reinit_shared: bool = False
    expert_scale: float = 1.0
    shared_scale: float = 1.0
    router_std: float | None = None
    gate_std: float | None = None
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001
    dense_layers: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name}: got {getattr(self, name)}, expected at least 1"
            for name in ("num_experts", "topk", "expert_width", "shared_width")
            if getattr(self, name) < 1
        ]
        if self.topk > self.num_experts:
            problems.append(f"topk: got {self.topk}, expected at most num_experts, {self.num_experts}")
        if not 0.0 <= self.reinit <= 1.0:
            problems.append(f"reinit: got {self.reinit}, expected 0 to 1")
        for name in ("reinit_std", "router_std", "gate_std", "router_aux_loss_coef", "expert_scale", "shared_scale"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                problems.append(f"{name}: got {value}, expected a number of at least 0")
        if self.reinit_unit not in UNITS:
            problems.append(f"reinit_unit: got {self.reinit_unit!r}, expected one of {', '.join(UNITS)}")
        if problems:
            raise ConfigError("upcycling: " + "; ".join(problems))


def make_recipe(
    dense: QwenConfig,
    *,
    num_experts: int,
    topk: int,
    granularity: int | None = None,
    expert_width: int | None = None,
    shared_width: int | None = None,
    **fields: Any,
) -> UpcyclingRecipe:
    """Return a recipe for a dense model, its widths from what a user gives.

    Args:
        dense: the model to start from.
        num_experts: routed experts per MoE layer.
        topk: experts per token.
        granularity: experts that one dense MLP is worth; it must divide intermediate_size.
        expert_width: neurons of an expert instead.
        shared_width: neurons of the shared expert; `topk` experts' worth by default, as in Qwen1.5 and Qwen2.
        fields: further fields of the recipe.

    Raises:
        ConfigError: not one of granularity and expert_width, or see `UpcyclingRecipe`.
    """
    width = dense.intermediate_size
    if (granularity is None) == (expert_width is None):
        raise ConfigError("upcycling: give either --granularity or --expert-width")
    if granularity is not None:
        if granularity < 1 or width % granularity:
            near = [each for each in range(1, width + 1) if width % each == 0 and each <= 128]
            raise ConfigError(
                f"granularity: got {granularity}, expected a divisor of intermediate_size {width}, such as "
                f"{', '.join(map(str, near))}; or give --expert-width"
            )
        expert_width = width // granularity
    assert expert_width is not None
    shared_width = topk * expert_width if shared_width is None else shared_width
    return UpcyclingRecipe(
        num_experts=num_experts, topk=topk, expert_width=expert_width, shared_width=shared_width, **fields
    )


def upcycled_config(dense: QwenConfig, recipe: UpcyclingRecipe) -> QwenConfig:
    """Return the configuration of the MoE model.

    Raises:
        ConfigError: the model is a MoE already, or `dense_layers` are not layers of it.
    """
    if dense.is_moe:
        raise ConfigError("upcycling: the model is a MoE already; give a dense Qwen2 or Qwen2.5 checkpoint")
    return replace(
        dense,
        model_type="qwen2_moe",
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.topk,
        moe_intermediate_size=recipe.expert_width,
        shared_expert_intermediate_size=recipe.shared_width,
        norm_topk_prob=recipe.norm_topk_prob,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
        mlp_only_layers=recipe.dense_layers,
    )


def num_copies(width: int, dense_width: int) -> int:
    """Return how many dense MLPs are needed for so many neurons."""
    return -(-width // dense_width)


class UpcycledModel:
    """The MoE model as a source of tensors, made row by row from the dense folder.

    Attributes:
        path: the dense folder.
        config: of the MoE model.
        recipe: as given.
    """

    def __init__(self, dense: HfFolder, recipe: UpcyclingRecipe) -> None:
        """Describe the model; nothing is read yet.

        Raises:
            ConfigError: see `upcycled_config`.
        """
        self.path, self.recipe = dense.path, recipe
        self.config = upcycled_config(dense.config, recipe)
        self._dense = dense
        self._places = {
            name: (item, index) for item in parameters(dense.config) for index, name in enumerate(item.hf_names)
        }
        if dense.config.tie_word_embeddings:
            self._places["lm_head.weight"] = (tied_output(dense.config), 0)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def description(self) -> Mapping[str, Any]:
        """Return what decides the values, beside the dense folder, as JSON types."""
        return {**asdict(self.recipe), "dense_layers": list(self.recipe.dense_layers)}

    def plan(self, dtype: torch.dtype | None = None) -> ConversionPlan:
        """Prove from the headers that the dense folder holds its model, and plan the MoE model in `dtype`.

        Raises:
            MismatchError: config.json and weights contradict each other; the message lists everything found.
        """
        dense = self._dense.plan(dtype)
        entries = {
            name: self._entry(item, name, shape)
            for item in parameters(self.config)
            for name, shape in zip(item.hf_names, item.hf_shapes, strict=True)
        }
        plan = plan_import(self.config, entries, where=str(self.path), dtype=dtype)
        mlp = [entry for name, entry in self._dense.entries.items() if name.startswith("model.layers.0.mlp.")]
        kept = f"the dense MLP at hand stays in memory beside: {sum(entry.num_bytes for entry in mlp):,} bytes"
        return replace(plan, has_equal_output=dense.has_equal_output, notes=(*dense.notes, kept))

    def dtype_of(self, parameter: Parameter) -> torch.dtype:
        """Return the dtype of the dense tensor it is made from."""
        return self._dense.dtype_of(self._places[_origin(parameter.hf_names[0])][0])

    def hf_rows(self, parameter: Parameter, index: int, begin: int, end: int) -> Tensor:
        """Return rows of the parameter's Hugging Face tensor number `index`."""
        name = parameter.hf_names[index]
        if name in self._places:
            return self._dense.hf_rows(*self._places[name], begin, end)
        if name.endswith(("mlp.gate.weight", "mlp.shared_expert_gate.weight")):
            std = self._std(self.recipe.router_std if name.endswith("mlp.gate.weight") else self.recipe.gate_std)
            rows = [
                _normal(_generator(self.recipe.seed, name, row), parameter.shape[1], std) for row in range(begin, end)
            ]
            return torch.from_numpy(np.stack(rows)).to(self.dtype_of(parameter))
        return self._mlp_rows(name, begin, end)

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows of the parameter as Megatron lays it out."""

        def read(index: int, low: int, high: int) -> Tensor:
            return self.hf_rows(parameter, index, low, high)

        return gather_rows(parameter, self.config, begin, end, read)

    def hf_tensors(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """Return the parameter's Hugging Face tensors."""
        shapes = enumerate(parameter.hf_shapes)
        return tuple(self.hf_rows(parameter, index, 0, shape[0]) for index, shape in shapes)

    def read(self, parameter: Parameter, shard: Shard = WHOLE, *, vocabulary_rows: int | None = None) -> Tensor:
        """Return the parameter as Megatron lays it out, or one tensor-parallel shard of it."""
        return read_shard(self, parameter, shard, vocabulary_rows)

    def side_folders(self) -> tuple[Path, ...]:
        """Return where tokenizer and generation files lie."""
        return self._dense.side_folders()

    def check_unchanged(self) -> None:
        """Raise CorruptInputError if a file of the dense folder was written to since it was opened."""
        self._dense.check_unchanged()

    def _entry(self, parameter: Parameter, name: str, shape: tuple[int, ...]) -> TensorEntry:
        origin = self._dense.entries[_origin(name)]
        return replace(origin, name=name, shape=shape)

    def _std(self, given: float | None) -> float:
        return self.config.initializer_range if given is None else given

    def _mlp_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Return rows of a matrix of an expert or of the shared expert."""
        prefix, matrix, _ = name.rsplit(".", 2)
        is_down, is_shared = matrix == "down_proj", prefix.endswith("shared_expert")
        neurons = self._neurons(prefix)
        dense = self._dense_tensor(_origin(name))
        rows = dense[begin:end].index_select(1, neurons) if is_down else dense.index_select(0, neurons[begin:end])
        if self.recipe.reinit > 0.0 and (self.recipe.reinit_shared or not is_shared):
            rows = self._drawn_anew(rows, name, begin, len(neurons))
        scale = self.recipe.shared_scale if is_shared else self.recipe.expert_scale
        return (rows.float() * scale).to(dense.dtype) if is_down and scale != 1.0 else rows

    def _drawn_anew(self, rows: Tensor, name: str, begin: int, width: int) -> Tensor:
        """Return rows, the first of which is number `begin` of their matrix, with a random share replaced."""
        prefix, matrix, _ = name.rsplit(".", 2)
        values = rows.float().numpy()
        std = self._std(self.recipe.reinit_std)
        chosen = self._chosen_neurons(prefix, width) if self.recipe.reinit_unit == "neuron" else None
        for number, row in enumerate(values, begin):
            generator = _generator(self.recipe.seed, name, number)
            if chosen is None:
                mask = np.less(generator.random(len(row), dtype=np.float32), np.float32(self.recipe.reinit))
            else:
                mask = chosen if matrix == "down_proj" else chosen[number : number + 1]
            np.copyto(row, _normal(generator, len(row), std), where=mask)
        return torch.from_numpy(values).to(rows.dtype)

    def _neurons(self, prefix: str) -> Tensor:
        """Return which neurons of the dense MLP make up an expert, or the shared expert: a cut of shuffled copies."""
        layer, dense_width = prefix.split(".mlp.")[0], self._dense.config.intermediate_size
        if prefix.endswith("shared_expert"):
            begin, end, kind = 0, self.recipe.shared_width, "shared"
        else:
            begin, kind = int(prefix.rpartition(".")[2]) * self.recipe.expert_width, "routed"
            end = begin + self.recipe.expert_width
        copies = range(begin // dense_width, num_copies(end, dense_width))
        shuffled = [
            _generator(self.recipe.seed, f"{layer}.mlp.{kind} copies", copy).permutation(dense_width) for copy in copies
        ]
        offset = copies.start * dense_width
        return torch.from_numpy(np.concatenate(shuffled)[begin - offset : end - offset])

    def _chosen_neurons(self, prefix: str, width: int) -> npt.NDArray[np.bool_]:
        """Return which neurons of an expert are drawn anew: exactly the share asked for, rounded."""
        order = _generator(self.recipe.seed, f"{prefix} neurons", 0).permutation(width)
        mask = np.zeros(width, dtype=np.bool_)
        mask[order[: round(self.recipe.reinit * width)]] = True
        return mask

    def _dense_tensor(self, name: str) -> Tensor:
        """Return a whole matrix of a dense MLP; those of the layer at hand stay in memory."""
        with self._lock:
            if name not in self._cache:
                while len(self._cache) >= _CACHED_TENSORS:
                    self._cache.popitem(last=False)
                parameter, index = self._places[name]
                self._cache[name] = self._dense.hf_rows(parameter, index, 0, parameter.hf_shapes[index][0])
            self._cache.move_to_end(name)
            return self._cache[name]


def _origin(name: str) -> str:
    """Return the dense tensor that gives a tensor its values, or at least its dtype."""
    layer, inside, rest = name.partition(".mlp.")
    if not inside:
        return name
    matrix = rest.split(".")[-2]
    return f"{layer}.mlp.{matrix}.weight" if matrix.endswith("_proj") else f"{layer}.mlp.gate_proj.weight"


def _generator(seed: int, name: str, row: int) -> np.random.Generator:
    """Return the generator of one row of one tensor; its key is the seed and the name, its counter the row."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key, counter=row << 192))


def _normal(generator: np.random.Generator, count: int, std: float) -> npt.NDArray[np.float32]:
    return generator.standard_normal(count, dtype=np.float32) * np.float32(std)


def prepare_upcycle(dense_dir: str | Path, out_dir: str | Path, recipe: UpcyclingRecipe, **options: Any) -> Conversion:
    """Prove from headers that a dense Hugging Face folder can be upcycled, and return the conversion ready to run.

    Args:
        dense_dir: a dense Qwen2 or Qwen2.5 model.
        out_dir: the Hugging Face folder of the MoE model to be made.
        recipe: see `make_recipe`.
        options: fields of `ConversionOptions`.

    Raises:
        MismatchError, ConfigError, CorruptInputError, IncompleteInputError, UnsafeInputError: the input.
        StorageError: disk full, or the target is in the way.
    """
    chosen = ConversionOptions(**options)
    source = UpcycledModel(HfFolder(Path(dense_dir), allow_pickle=chosen.allow_pickle), recipe)
    return prepare(UPCYCLE, source, Path(out_dir), chosen, recipe=source.description())


def upcycle_hf(dense_dir: str | Path, out_dir: str | Path, recipe: UpcyclingRecipe, **options: Any) -> ConversionReport:
    """Make a MoE model from a dense one; arguments and errors as `prepare_upcycle`, and those of `import_hf`."""
    return prepare_upcycle(dense_dir, out_dir, recipe, **options).run()
