"""The device of this process, and the CPU platform: what lets Megatron-Core run without a GPU.

Nothing happens on import. `install_cpu_platform()` does nothing where CUDA is available; elsewhere
it shows the stand-ins of `stand_in.py` to `megatron.*` modules, through the names they import.
`torch.cuda` stays truthful for everybody else, so that inductor, DataLoader or transformers in the
same process never believe in a GPU.

Four tensor methods cannot be scoped by import, because methods belong to the class. They look at
their caller and change for `megatron.*` callers only (where each is met in megatron-core 0.16.1):

* `Tensor.cuda` returns the tensor (tied embeddings under PP, language_module.py:244);
* `Tensor.type` says `torch.cuda.FloatTensor` where the optimizer sorts parameters by
  that name (distrib_optimizer.py:361, optimizer.py:671, clip_grads.py:167);
* `Tensor.pin_memory` returns the tensor (param_and_grad_buffer.py:976, offload to CPU);
* `Tensor.record_stream` does nothing (token_dispatcher.py, side streams).
"""

from __future__ import annotations

import builtins
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_qwen.parallel.stand_in import CPU, Overlay, overlay

_SCOPE = "megatron."
_overlays: dict[str, Overlay] = {}


def current_device() -> torch.device:
    """Return the device of this rank: cuda:LOCAL_RANK where CUDA is available, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return CPU


def device_name(device: torch.device | None = None) -> str:
    """Return what a person calls a device, that of this rank by default: the GPU's name, or the CPU model."""
    device = device or current_device()
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def communication_backend() -> str:
    """Return the torch.distributed backend that fits the device: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def install_cpu_platform() -> bool:
    """Let Megatron-Core run on this machine's CPU.

    Idempotent. Modules imported before and after the call are covered.

    Returns:
        True where the platform is installed; False where CUDA is available, and nothing was touched.
    """
    if torch.cuda.is_available():
        return False
    if not _overlays:
        _overlays.update(overlay())
        sys.meta_path.insert(0, _MegatronFinder())
        for name, module in list(sys.modules.items()):
            if name.startswith(_SCOPE):
                _adopt(module)
        _scope_tensor_methods()
        logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_one_generator_is_meant)
    return True


def _one_generator_is_meant(record: logging.LogRecord) -> bool:
    """Drop Megatron's warning that the CPU generator moved inside a GPU fork: here they are the same one."""
    return not record.getMessage().startswith("CPU RNG state changed within GPU RNG context")


class _MegatronFinder(importlib.abc.MetaPathFinder):
    """Finds megatron.* modules as the other finders do, and has them import through `_import`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_SCOPE):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    setattr(spec.loader, "exec_module", functools.partial(_execute, spec.loader.exec_module))  # noqa: B010
                return spec
        return None


def _execute(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    # A module's import statements call the __import__ of its own builtins, if it has any.
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
    exec_module(module)


def _import(
    name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
) -> ModuleType:  # the signature is that of builtins.__import__
    module = builtins.__import__(name, globals, locals, fromlist, level)
    return _overlays.get(module.__name__, module)


def _adopt(module: ModuleType) -> None:
    """Give a module imported before the installation what `_import` gives the later ones."""
    stand_ins: dict[int, Any] = {id(each._real): each for each in _overlays.values()}
    for each in _overlays.values():
        stand_ins |= {
            id(getattr(each._real, name)): value
            for name, value in vars(each).items()
            if not name.startswith("__") and hasattr(each._real, name)
        }
    for name, value in list(vars(module).items()):
        if not name.startswith("__"):
            setattr(module, name, stand_ins.get(id(value), _without_compiler(value)))
            if isinstance(value, type) and value.__module__ == module.__name__:
                for key, method in list(vars(value).items()):
                    if _without_compiler(method) is not method:
                        setattr(value, key, _without_compiler(method))


def _without_compiler(value: Any) -> Any:
    """Return the plain function behind a torch.compile'd one; anything else as it is."""
    return getattr(value, "_torchdynamo_orig_callable", value) if callable(value) else value


def _scope_tensor_methods() -> None:
    for name, stand_in in _TENSOR_METHODS.items():
        setattr(torch.Tensor, name, _for_megatron_callers(getattr(torch.Tensor, name), stand_in))


def _for_megatron_callers(method: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_SCOPE):
            return stand_in(method, self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call


def _gpu_type_name(method: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return method(tensor, *args, **kwargs)
    return str(method(tensor)).replace("torch.", "torch.cuda.")


_TENSOR_METHODS: dict[str, Callable[..., Any]] = {
    "cuda": lambda method, tensor, *_, **__: tensor,
    "type": _gpu_type_name,
    "pin_memory": lambda method, tensor, *_, **__: tensor,
    "record_stream": lambda method, tensor, *_, **__: None,
}
