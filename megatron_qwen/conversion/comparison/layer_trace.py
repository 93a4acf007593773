"""One decoder layer as Megatron computes it: filled from a checkpoint, recorded, and judged module by module.

    module = DecoderLayer(config, is_moe=False)
    module.load(a, 3)
    tape = module.record(hidden_SBH)            # what goes through every module
    module.load(b, 3)
    found = module.replay(tape)                 # the same modules, each given what the tape says went into it

In a replay every module gets the recorded input and hands on the recorded output, so a fault shows in the module that
has it and in none behind it. Only one layer is ever in memory, whatever the size of the model.

Shapes: S tokens, B sequences (one), H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.names import MEGATRON_LAYER
from megatron_qwen.conversion.parameters import parameters
from megatron_qwen.model.config import QwenConfig

Tape = dict[str, tuple[Tensor, ...]]
"""What came out of each module ("<module>:out"), and what went into those of `_BETWEEN` ("<module>:in")."""

LAYER = "layer"
# Every module that is judged, in the order of the computation; names are Megatron's, relative to the layer.
_ORDER = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.rotary_pos_emb",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention",
    "self_attn_bda",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.activation_func",
    "mlp.linear_fc2",
    "mlp.router.gating",
    "mlp.router.routing",
    "mlp.experts.local_experts",
    "mlp.token_dispatcher",
    "mlp.experts",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.activation_func",
    "mlp.shared_experts.linear_fc2",
    "mlp.shared_experts.gate_weight",
    "mlp",
    "mlp_bda",
)
# What lies between one module and the next has no module of its own: a difference in the second one's input is its.
_BETWEEN = {
    "self_attention.core_attention:in": "self_attention.rotary_pos_emb",
    "pre_mlp_layernorm:in": "self_attn_bda",
    "mlp.linear_fc2:in": "mlp.activation_func",
    "mlp.experts:in": "mlp.token_dispatcher",
    "mlp.shared_experts.linear_fc2:in": "mlp.shared_experts.activation_func",
    # Its two matrices are judged before; what is left is the gate.
    "mlp.shared_experts:out": "mlp.shared_experts.gate_weight",
    "layer:out": "mlp_bda",
}
_VISITED = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.router.gating",
    "mlp.router.routing",
    "mlp.experts",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
    "mlp.shared_experts",
)


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far two results of one module are apart on the same input.

    Attributes:
        module: Megatron's name, relative to the layer.
        max_abs: largest |A-B|; infinite where only one of the two is a finite number.
        value_range: largest less smallest value of A.
        relative: |A-B| over |A|, both in the 2-norm.
        where: index of the largest difference in the module's output.
    """

    module: str
    max_abs: float
    value_range: float
    relative: float
    where: tuple[int, ...] = ()

    @property
    def of_range(self) -> float:
        """The largest difference as a part of the range; 0 if there is none."""
        return self.max_abs / self.value_range if self.value_range else (float("inf") if self.max_abs else 0.0)


def measure(module: str, a: Tensor, b: Tensor) -> Gap:
    """Return how far two tensors of one shape are apart; a NaN in both at the same place is no difference."""
    if torch.equal(a, b):
        low, high = torch.aminmax(a) if a.numel() else (a.new_zeros(()), a.new_zeros(()))
        return Gap(module=module, max_abs=0.0, value_range=float(high) - float(low), relative=0.0)
    x, y = a.detach().double(), b.detach().double()
    gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs()).nan_to_num(nan=float("inf"))
    worst = torch.unravel_index(gap.argmax(), gap.shape)
    finite = x[x.isfinite()]
    size = float(finite.norm())
    max_abs, distance = float(gap[worst]), float(gap.norm())
    return Gap(
        module=module,
        max_abs=max_abs,
        value_range=float(finite.max() - finite.min()) if finite.numel() else 0.0,
        relative=distance / size if size else (float("inf") if distance else 0.0),
        where=tuple(int(i) for i in worst) if max_abs else (),
    )


def layer_config(config: QwenConfig, *, is_moe: bool) -> QwenConfig:
    """Return the model of one layer that computes as those of `config` do; equal for models whose layers do."""
    dense: dict[str, Any] = {
        "model_type": "qwen2",
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 0,
        "shared_expert_intermediate_size": 0,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.0,
    }
    return replace(
        config,
        **({} if is_moe else dense),
        num_hidden_layers=1,
        mlp_only_layers=(),
        decoder_sparse_step=1,
        vocab_size=1,
        tie_word_embeddings=False,
        torch_dtype="float32",
        initializer_range=0.02,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        dual_chunk_attention=None,
    )


class DecoderLayer:
    """A `TransformerLayer` in fp32 on this rank's device, local spec, whose weights are exchanged."""

    def __init__(self, config: QwenConfig) -> None:
        """Build the only layer of `config`, which comes from `layer_config`.

        Raises:
            ConfigError: this process runs a parallel layout of more than one rank.
        """
        from megatron_qwen.model.build import build_model
        from megatron_qwen.parallel.layout import ParallelLayout

        self._model = build_model(
            config, layout=ParallelLayout(), dtype=torch.float32, backend="local", pre_process=False,
            post_process=False, perform_initialization=False,
        ).eval()  # fmt: skip
        self._layer = self._model.decoder.layers[0]
        if config.is_moe:
            self._layer.mlp.in_one_operation = False  # its modules are judged one by one
        self._modules = dict(self._layer.named_modules())
        self._weights = dict(self._layer.named_parameters())
        self._device = next(iter(self._weights.values())).device

    def load(self, source: WeightSource, layer: int) -> None:
        """Fill the weights with those of one layer of a checkpoint."""
        prefix = MEGATRON_LAYER.format(layer=layer)
        missing = set(self._weights)
        for parameter in parameters(source.config):
            if parameter.layer == layer:
                name = parameter.megatron_name.removeprefix(prefix)
                with torch.no_grad():
                    self._weights[name].copy_(source.read(parameter))
                missing.remove(name)
        assert not missing, missing

    def run(self, hidden_SBH: Tensor) -> Tensor:
        """Return the layer's output [S, B, H]."""
        self._model.set_input_tensor(hidden_SBH.to(self._device))
        positions_BS = torch.arange(hidden_SBH.shape[0], device=self._device).unsqueeze(0)
        with torch.no_grad():
            output: Tensor = self._model(None, positions_BS, None)
        return output.clone()

    def record(self, hidden_SBH: Tensor) -> Tape:
        """Run the layer and return what went through its modules, every expert's on all tokens."""
        tape: Tape = {f"{LAYER}:in": (hidden_SBH,)}

        def keep(site: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tape[site] = tuple(tensor.clone() for tensor in tensors)
            return tensors

        with self._visited(_VISITED, keep):
            output = self.run(hidden_SBH)
        tape[f"{LAYER}:out"] = (output,)
        self._visit_experts(tape, keep)
        return tape

    def replay(self, tape: Tape) -> list[Gap]:
        """Run every module on what the tape gives it and return how far each is off, in the order of computation."""
        gaps: dict[str, Gap] = {}

        def judge(site: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if site not in tape:
                return tensors
            expected = tape[site]
            assert len(expected) == len(tensors), (site, len(expected), len(tensors))
            name = _BETWEEN.get(site) or site.partition(":")[0]
            for a, b in zip(expected, tensors, strict=True):
                gap = measure(name, a.to(b.device), b)
                gaps[name] = max(gaps.get(name, gap), gap, key=lambda each: each.of_range)
            return tuple(a.to(b.device).clone() for a, b in zip(expected, tensors, strict=True))

        on_tape = {site.partition(":")[0] for site in tape if "local_experts" not in site}
        with self._visited(tuple(on_tape), judge):
            output = self.run(tape[f"{LAYER}:in"][0])
        judge(f"{LAYER}:out", (output,))
        self._visit_experts(tape, judge)
        return sorted(gaps.values(), key=lambda gap: _place(gap.module))

    def _visit_experts(self, tape: Tape, visit: _Visit) -> None:
        # In a short text some experts get no token: each is run on all of them.
        normed = tape.get("pre_mlp_layernorm:out")
        if normed is None or "mlp.router.gating:out" not in tape:
            return
        tokens_TH = normed[0].flatten(0, 1).to(self._device)
        experts = self._modules["mlp.experts"].local_experts
        for number in range(len(experts)):
            name = f"mlp.experts.local_experts.{number}"
            with self._visited((f"{name}.linear_fc1", f"{name}.linear_fc2"), visit), torch.no_grad():
                self._modules[name](tokens_TH)

    @contextlib.contextmanager
    def _visited(self, names: tuple[str, ...], visit: _Visit) -> Iterator[None]:
        """Let `visit` see, and replace, what goes into and comes out of the named modules."""
        with contextlib.ExitStack() as stack:
            for name in names:
                if name in self._modules:
                    stack.enter_context(_hooked(self._modules[name], name, visit))
                elif name.startswith("mlp.router.") and "mlp.router" in self._modules:
                    stack.enter_context(_wrapped(self._modules["mlp.router"], name, visit))
            yield


_Visit = Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...]]


@contextlib.contextmanager
def _hooked(module: torch.nn.Module, name: str, visit: _Visit) -> Iterator[None]:
    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return _exchange((args, kwargs), lambda tensors: visit(f"{name}:in", tensors))

    def after(_: Any, args: Any, output: Any) -> Any:
        return _exchange(output, lambda tensors: visit(f"{name}:out", tensors))

    handles = [module.register_forward_hook(after)]
    if f"{name}:in" in _BETWEEN:  # every other input is the output of the module before
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _wrapped(owner: torch.nn.Module, name: str, visit: _Visit) -> Iterator[None]:
    """The router's two steps are methods, not modules."""
    method = name.rpartition(".")[2]
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        return _exchange(original(*args, **kwargs), lambda tensors: visit(f"{name}:out", tensors))

    setattr(owner, method, call)
    try:
        yield
    finally:
        delattr(owner, method)


def _exchange(content: Any, swap: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Any:
    """Return nested tuples, lists and dicts with all their tensors replaced at once."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _walk(content, collect)
    replaced = iter(swap(tuple(found)))
    return _walk(content, lambda _: next(replaced))


def _walk(content: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(content, Tensor):
        return change(content)
    if type(content) in (tuple, list):
        return type(content)(_walk(each, change) for each in content)
    if type(content) is dict:
        return {key: _walk(each, change) for key, each in content.items()}
    return content


def _place(module: str) -> tuple[int, int]:
    """Place a name in the order of the computation; experts by number."""
    if module in _ORDER:
        return _ORDER.index(module), 0
    stem, number, _ = module.rsplit(".", 2)
    return _ORDER.index(stem), int(number)
