"""Names the parts of our training step in a profile: ranges around modules, the loss, and what follows backward.

The ranges exist only inside `named_ranges`; a step outside it runs as in training.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from megatron_qwen.benchmark.breakdown import PREFIX

if TYPE_CHECKING:
    from megatron_qwen.training.step import TrainStep

# By the last part of a module's path in Megatron-Core's GPTModel.
_KINDS = {
    "embedding": "embedding",
    "rotary_pos_emb": "rope, QKV split",
    "input_layernorm": "norm",
    "pre_mlp_layernorm": "norm",
    "final_layernorm": "norm",
    # What is left of it beside the modules below.
    "self_attention": "rope, QKV split",
    "linear_qkv": "qkv GEMM",
    "core_attention": "attention",
    "linear_proj": "proj GEMM",
    "mlp": "swiglu",
    "linear_fc1": "fc1 GEMM",
    "linear_fc2": "fc2 GEMM",
    "router": "router",
    "experts": "experts",
    "shared_experts": "shared expert",
    "output_layer": "output GEMM",
}


def module_kind(path: str, module: torch.nn.Module) -> str | None:
    """Return the kind of the module at `path` of a GPTModel; None if it belongs to what is around it."""
    *around, name = path.split(".")
    if "experts" in around or "shared_experts" in around or isinstance(module, torch.nn.ModuleList):
        return None
    if name == "mlp" and hasattr(module, "router"):
        # In one operation where all experts are on this rank; elsewhere its parts are modules of their own.
        return "experts + shared expert" if getattr(module, "in_one_operation", False) else "dispatch"
    if around and around[-1] == "layers":
        return "residual"
    return _KINDS.get(name)


@contextlib.contextmanager
def named_ranges(step: TrainStep) -> Iterator[None]:
    """Put every part of `step` into a profiler range that starts with `breakdown.PREFIX`, inside the block."""
    from megatron_qwen.training import optim
    from megatron_qwen.training import step as step_module

    config, optimizer = step.chunks[0].config, step.optimizer
    with contextlib.ExitStack() as stack:

        def around(owner: Any, function: str, kind: str) -> None:
            stack.enter_context(_replaced(owner, function, _in_range(getattr(owner, function), kind)))

        for chunk in step.chunks:
            around(chunk, "zero_grad_buffer", "zero gradients")
            around(chunk.module, "compute_language_model_loss", "loss")
            around(chunk.module, "compute_fused_loss", "output GEMM + loss")
            fused = [
                f"{path}." for path, each in chunk.module.named_modules() if getattr(each, "in_one_operation", False)
            ]
            for path, module in chunk.module.named_modules():
                kind = module_kind(path, module)
                # Within one operation no module but the router runs, though pre-hooks are called: no range would end.
                is_inside = any(path.startswith(each) for each in fused) and kind != "router"
                if kind is not None and not is_inside:
                    stack.enter_context(_module_range(module, kind))
        around(step_module, "lm_loss", "loss")
        around(config, "finalize_model_grads_func", "gradient reduction")
        around(optimizer, "zero_grad", "zero gradients")
        around(optimizer, "prepare_grads", "optimizer")
        around(optimizer, "get_grad_norm", "gradient clipping")
        around(optim, "divide_gradients", "gradient clipping")
        around(optimizer, "step_with_ready_grads", "optimizer")
        around(step, "_reduce", "report")
        yield


def _in_range(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + kind):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    was_own, previous = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, previous)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _module_range(module: torch.nn.Module, kind: str) -> Iterator[None]:
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        opened.append(record_function(PREFIX + kind))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
