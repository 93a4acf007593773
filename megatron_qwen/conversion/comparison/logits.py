"""Runs two checkpoints on the same tokens in fp32 and names the first layer and module in which they part.

The layers go by one at a time: A's is run and recorded, then B's weights (or B's arithmetic, where the configurations
differ) get A's input at every module. So the module named is the one at fault, and two models of any size are compared
in the memory of one layer. Beside it B's own hidden state is carried along, as B would compute it.

Shapes: S tokens, B sequences (one), H hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from megatron_qwen.conversion.comparison.advance import Progress, silent
from megatron_qwen.conversion.comparison.explain import explain, moved_layers
from megatron_qwen.conversion.comparison.layer_trace import LAYER, DecoderLayer, Gap, Tape, layer_config, measure
from megatron_qwen.conversion.comparison.referee import TransformersTeacher
from megatron_qwen.conversion.comparison.sample_text import sample_tokens
from megatron_qwen.conversion.comparison.stored_arguments import contradictions
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.parameters import Parameter, parameters
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig

DEFAULT_TOLERANCE = 1e-6
"""Of a module's range of values. The same arithmetic runs on both sides, so equal weights give 0."""
REFEREE_TOLERANCE = 1e-4
"""Likewise against transformers, whose kernels round differently."""
DEFAULT_TOKENS = 64
WHOLE_LAYER = "whole layer"
EMBEDDING, FINAL_NORM, OUTPUT = "embedding.word_embeddings", "decoder.final_layernorm", "output_layer"
# What must agree for the modules of one model to take the inputs of the other's.
_STRUCTURE = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_ROWS = 16384
"""Vocabulary rows multiplied at once."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A module that differs on equal input, or a field of the configuration that makes a comparison impossible.

    Attributes:
        layer: decoder layer counted from 0; None outside the layers.
        module: Megatron's name, relative to the layer; "whole layer" if B has another layer's weights there.
        gap: how far apart; None for a structural difference.
        reason: what the weights or the configuration say about it; may be empty.
    """

    layer: int | None
    module: str
    gap: Gap | None
    reason: str

    def __str__(self) -> str:
        place = self.module if self.layer is None else f"layer {self.layer}, {self.module}"
        size = "" if self.gap is None else f": max |A-B| {self.gap.max_abs:.3g} of range {self.gap.value_range:.3g}"
        return place + (f" ({self.reason})" if self.reason else "") + size


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of the comparison.

    Attributes:
        layer: counted from 0.
        hidden: A's and B's own hidden states behind the layer.
        worst: the module that differs most on equal input, as a part of its range.
    """

    layer: int
    hidden: Gap
    worst: Gap


@dataclass(frozen=True, kw_only=True)
class LogitsReport:
    """Outcome of a comparison by running both models.

    Attributes:
        a, b: the folders.
        notes: what a user should know.
        against: who computed A: "megatron" or "transformers".
        tokens: length of the text.
        text: whether it was text of the folder's tokenizer rather than random ids.
        tolerance: largest difference of a module, as a part of its range, that counts as equal.
        layers: one row per layer that was run.
        divergences: every module beyond the tolerance in the order of the computation.
        max_abs: largest difference of the logits of the two models, each by itself.
        logit_range: largest less smallest of A's logits.
        same_top1: tokens for which both rate the same next token highest.
    """

    a: str
    b: str
    notes: tuple[str, ...]
    against: str
    tokens: int
    text: bool
    tolerance: float
    layers: tuple[LayerRow, ...]
    divergences: tuple[Divergence, ...]
    max_abs: float
    logit_range: float
    same_top1: int

    @property
    def first(self) -> Divergence | None:
        """The first divergence in the order of the computation."""
        return self.divergences[0] if self.divergences else None

    @property
    def is_equal(self) -> bool:
        """Whether no module diverges by more than the tolerance."""
        return not self.divergences

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        if self.first is not None:
            return f"first divergence: {self.first}"
        worst = max((row.worst.of_range for row in self.layers), default=0.0)
        if worst == self.max_abs == 0.0:
            return "no divergence: every module is equal to the last bit"
        return f"no divergence above {self.tolerance:.3g} of a module's range; the largest is {worst:.3g}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "is_equal": self.is_equal, "verdict": self.verdict}


class Teacher(Protocol):
    """Gives what A computes; one method per stage, called in order."""

    def embedding(self) -> Tensor:
        """Return the embedded tokens [S, 1, H]."""

    def layer(self, number: int, hidden_SBH: Tensor) -> Tape:
        """Return what passes through the layer's modules on this input."""

    def final_norm(self, hidden_SBH: Tensor) -> Tensor:
        """Return the normalised output of the last layer."""

    def logits(self, normed_SH: Tensor, begin: int, end: int) -> Tensor:
        """Return the logits [S, end - begin] of these vocabulary rows."""


def compare_logits(
    a: str | Path,
    b: str | Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    tolerance: float | None = None,
    against: str = "megatron",
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> LogitsReport:
    """Run both models on the same tokens and judge every module of B on the input that A's has.

    Args:
        a: a Hugging Face or Megatron folder; a Hugging Face folder against transformers.
        b: a Hugging Face or Megatron folder.
        tokens: length of the text: of the folder's tokenizer where there is one, else random ids.
        seed: of random ids, and of where the text begins.
        tolerance: largest difference, as a part of a module's range of values, that counts as equal; None takes
            `DEFAULT_TOLERANCE` or `REFEREE_TOLERANCE`.
        against: who runs A: "megatron" (its modules, as for B) or "transformers" (in a process of its own).
        allow_pickle: open weights that are pickles, as plain data.
        progress: of the layers.

    Raises:
        ConfigError: an argument out of range.
        InputError: a folder cannot be read.
    """
    tolerance = _check_arguments(tokens, tolerance, against)
    left, right = (open_source(folder, allow_pickle=allow_pickle) for folder in (a, b))
    notes = [f"{side} {text}" for side, source in (("A", left), ("B", right)) for text in _follow_arguments(source)]
    report = LogitsReport(
        notes=tuple(notes),
        a=str(a), b=str(b), against=against, tokens=tokens, text=False, tolerance=tolerance, layers=(),
        divergences=tuple(_structural(left.config, right.config)), max_abs=0.0, logit_range=0.0, same_top1=0,
    )  # fmt: skip
    if report.divergences:
        return report
    ids_S, is_text = sample_tokens(left, right, tokens=tokens, seed=seed)
    report = replace(report, text=is_text)
    engines = _Engines()
    if against == "megatron":
        teacher = MegatronTeacher(left, engines, ids_S)
        report = _Comparison(left, right, engines, teacher).run(ids_S, report, progress)
    elif isinstance(left, HfFolder):
        with TransformersTeacher(left.path, ids_S) as referee:
            report = _Comparison(left, right, engines, referee).run(ids_S, report, progress)
    else:
        raise ConfigError(f"{a}: transformers runs Hugging Face folders; give one as A, the checkpoint to judge as B")
    for source in (left, right):
        source.check_unchanged()
    return report


_TOLERANCES = {"megatron": DEFAULT_TOLERANCE, "transformers": REFEREE_TOLERANCE}


def _check_arguments(tokens: int, tolerance: float | None, against: str) -> float:
    """Return the tolerance to use."""
    if tokens < 2:
        raise ConfigError(f"tokens: got {tokens}, expected at least 2")
    if against not in _TOLERANCES:
        raise ConfigError(f"against: got {against!r}, expected one of {', '.join(_TOLERANCES)}")
    tolerance = tolerance if tolerance is not None else _TOLERANCES[against]
    if not tolerance >= 0:
        raise ConfigError(f"tolerance: got {tolerance}, expected >= 0")
    return tolerance


class _Engines:
    """Layers by the arithmetic they do; models that agree in it share one and exchange its weights."""

    def __init__(self) -> None:
        self._built: dict[QwenConfig, DecoderLayer] = {}

    def load(self, source: WeightSource, number: int) -> DecoderLayer:
        """Return a layer with the weights of layer `number` of a checkpoint."""
        wanted = layer_config(source.config, is_moe=source.config.moe_layers()[number])
        if wanted not in self._built:
            self._built[wanted] = DecoderLayer(wanted)
        self._built[wanted].load(source, number)
        return self._built[wanted]


class MegatronTeacher:
    """A computed by Megatron's modules from its folder."""

    def __init__(self, source: WeightSource, engines: _Engines, ids_S: Tensor) -> None:
        self._source, self._engines, self._ids_S = source, engines, ids_S

    def embedding(self) -> Tensor:
        """Return the embedded tokens [S, 1, H]."""
        return _embed(self._source, self._ids_S)

    def layer(self, number: int, hidden_SBH: Tensor) -> Tape:
        """Return what passes through the layer's modules on this input."""
        return self._engines.load(self._source, number).record(hidden_SBH)

    def final_norm(self, hidden_SBH: Tensor) -> Tensor:
        """Return the normalised output of the last layer."""
        return _final_norm(self._source, hidden_SBH)

    def logits(self, normed_SH: Tensor, begin: int, end: int) -> Tensor:
        """Return the logits [S, end - begin] of these vocabulary rows."""
        return normed_SH @ _output_rows(self._source, begin, end).T


class _Comparison:
    """One pass through both models."""

    def __init__(self, a: WeightSource, b: WeightSource, engines: _Engines, teacher: Teacher) -> None:
        self._a, self._b, self._engines, self._teacher = a, b, engines, teacher
        self._found: list[Divergence] = []

    def run(self, ids_S: Tensor, report: LogitsReport, progress: Progress) -> LogitsReport:
        """Go through embedding, layers, final norm and output."""
        tolerance = report.tolerance
        hidden_a, hidden_b = self._teacher.embedding(), _embed(self._b, ids_S)
        self._judge([measure(EMBEDDING, hidden_a, hidden_b)], None, tolerance)
        rows = []
        counts = [source.config.num_hidden_layers for source in (self._a, self._b)]
        with progress("layers", min(counts), 0) as advance:
            for number in range(min(counts)):
                tape = self._teacher.layer(number, hidden_a)
                layer = self._engines.load(self._b, number)
                gaps = layer.replay(tape)
                hidden_a, hidden_b = tape[f"{LAYER}:out"][0], layer.run(hidden_b)
                hidden = measure(LAYER, hidden_a.to(hidden_b.device), hidden_b)
                rows.append(LayerRow(layer=number, hidden=hidden, worst=max(gaps, key=lambda gap: gap.of_range)))
                self._judge(gaps, number, tolerance)
                advance(1, 0)
        report = replace(report, layers=tuple(rows))
        if counts[0] != counts[1]:
            reason = f"config.num_hidden_layers: {counts[0]} and {counts[1]}"
            self._found.append(Divergence(layer=min(counts), module=WHOLE_LAYER, gap=None, reason=reason))
            return replace(report, divergences=tuple(self._found))
        normed_a = self._teacher.final_norm(hidden_a)
        self._judge([measure(FINAL_NORM, normed_a, _final_norm(self._b, hidden_a))], None, tolerance)
        gaps, figures = self._compare_output(normed_a[:, 0], _final_norm(self._b, hidden_b)[:, 0])
        self._judge(gaps, None, tolerance)
        return replace(report, divergences=tuple(self._found), **figures)

    def _judge(self, gaps: list[Gap], layer: int | None, tolerance: float) -> None:
        beyond = [gap for gap in gaps if gap.of_range > tolerance]
        if not beyond:
            return
        # Reasons cost reading: for the first place only, which is the one to be mended.
        is_first = not self._found
        if is_first and layer is not None and len(beyond) > 1:
            moved = moved_layers(self._a, self._b)
            if layer in moved:
                reason = f"B's layers {_listed(moved)} hold A's layers {_listed(moved.values())}"
                self._found.append(Divergence(layer=layer, module=WHOLE_LAYER, gap=beyond[0], reason=reason))
                is_first = False
        for gap in beyond:
            reason = explain(gap.module, layer, self._a, self._b) if is_first else ""
            self._found.append(Divergence(layer=layer, module=gap.module, gap=gap, reason=reason))

    def _compare_output(self, normed_a_SH: Tensor, normed_b_SH: Tensor) -> tuple[list[Gap], dict[str, Any]]:
        """Compare the logits of equal input (for the verdict) and of each model by itself (for the figures)."""
        rows = min(source.config.vocab_size for source in (self._a, self._b))
        gaps, tops_a, tops_b, highest, lowest, largest = [], [], [], -torch.inf, torch.inf, 0.0
        for begin in range(0, rows, _ROWS):
            weight_b = _output_rows(self._b, begin, min(begin + _ROWS, rows))
            logits_a_SV = self._teacher.logits(normed_a_SH, begin, begin + weight_b.shape[0])
            gaps.append(measure(OUTPUT, logits_a_SV, normed_a_SH @ weight_b.T))
            own_b_SV = normed_b_SH @ weight_b.T
            largest = max(largest, measure(OUTPUT, logits_a_SV, own_b_SV).max_abs)
            highest, lowest = max(highest, float(logits_a_SV.max())), min(lowest, float(logits_a_SV.min()))
            tops_a.append(logits_a_SV.max(dim=1))
            tops_b.append(own_b_SV.max(dim=1))
        worst = max(gaps, key=lambda gap: gap.max_abs)
        figures = {
            "max_abs": largest,
            "logit_range": highest - lowest,
            "same_top1": int((_argmax(tops_a) == _argmax(tops_b)).sum()),
        }
        return [replace(worst, value_range=highest - lowest)], figures


def _follow_arguments(source: WeightSource) -> list[str]:
    """Let a Megatron checkpoint compute as its stored arguments say, as Megatron-LM would; return what that changes."""
    found = contradictions(source)
    source.config = replace(source.config, **{item.field: item.stored for item in found})
    return [f"computes as its Megatron-LM arguments say: {item}" for item in found]


def _structural(a: QwenConfig, b: QwenConfig) -> Iterator[Divergence]:
    """Yield the differences that make modules of A and B incomparable."""
    for name in _STRUCTURE:
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            yield Divergence(layer=None, module=f"config.{name}", gap=None, reason=f"{x} and {y}")
    kinds = enumerate(zip(a.moe_layers(), b.moe_layers(), strict=False))
    for layer, (x, y) in kinds:
        if x != y:
            words = {True: "MoE", False: "dense"}
            yield Divergence(layer=layer, module="mlp", gap=None, reason=f"{words[x]} and {words[y]}")


def _parameter(config: QwenConfig, name: str) -> Parameter:
    (found,) = (item for item in parameters(config) if item.megatron_name == name)
    return found


def _embed(source: WeightSource, ids_S: Tensor) -> Tensor:
    """Return the embedded tokens [S, 1, H], their rows read one by one."""
    table = _parameter(source.config, f"{EMBEDDING}.weight")
    return torch.stack([source.hf_rows(table, 0, row, row + 1).float() for row in ids_S.tolist()])


def _final_norm(source: WeightSource, hidden_SBH: Tensor) -> Tensor:
    (weight_H,) = source.hf_tensors(_parameter(source.config, f"{FINAL_NORM}.weight"))
    return functional.rms_norm(hidden_SBH.cpu(), weight_H.shape, weight_H.float(), source.config.rms_norm_eps)


def _output_rows(source: WeightSource, begin: int, end: int) -> Tensor:
    """Return rows of the output matrix in fp32; of the embedding for tied models."""
    name = EMBEDDING if source.config.tie_word_embeddings else OUTPUT
    return source.hf_rows(_parameter(source.config, f"{name}.weight"), 0, begin, end).float()


def _argmax(parts: list[Any]) -> Tensor:
    """Return the index over all row blocks, given the maximum of each."""
    values, indices = torch.stack([part.values for part in parts]), torch.stack([part.indices for part in parts])
    block = values.argmax(dim=0)
    return block * _ROWS + indices.gather(0, block.unsqueeze(0))[0]


def _listed(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
