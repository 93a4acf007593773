"""The `torch` that Megatron-Core's modules see on a machine without a GPU.

Megatron-Core writes `torch.cuda.current_device()` and `device="cuda"` wherever it needs memory,
streams or random numbers. Here every such name has a counterpart that does the same job on the
CPU. The tables below are the whole story: `overlay()` puts them in front of the real modules, and
`device.py` shows the result to `megatron.*` modules and to nobody else.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import torch
import torch.cuda.amp
import torch.cuda.nvtx
import torch.distributed as dist

CPU = torch.device("cpu")

TENSOR_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip


class Overlay(ModuleType):
    """A module that answers from its own table first and from the real module for everything else."""

    def __init__(self, real: ModuleType, stand_ins: Mapping[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        vars(self).update(stand_ins, __path__=getattr(real, "__path__", []), __spec__=real.__spec__, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Stream:
    """Work on a CPU is done when the call returns: a stream has nothing to order."""

    cuda_stream = 0
    device = CPU
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def wait_event(self, event: Any) -> None:
        """Return at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Stamp `event` (or a new one) with the present time."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Everything has always been done."""
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """One priority only."""
        return 0, 0


class Event:
    """A time stamp with the interface of torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time now."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Everything has always been done."""
        return True

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`."""
        return 1e3 * (end_event._seconds - self._seconds)


class _Generators:
    """`torch.cuda.default_generators`: whatever the index, the process's one CPU generator."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def is_cuda_device(device: Any) -> bool:
    """Whether `device` (as a `device=` argument may come) names a CUDA device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no_context(*_: Any, **__: Any) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stand in for torch.compile and torch.jit.script: the plain function, as inductor's first call costs seconds."""
    return function if function is not None else _uncompiled


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with `device="cuda"` read as CPU memory, which nothing needs to pin."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if is_cuda_device(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """torch.distributed.all_gather, over gloo also with first dimensions that differ, as NCCL does."""
    rows = [each.shape[0] if each.dim() else 1 for each in tensor_list]
    if len(set(rows)) == 1:
        return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(gathered, padded, group=group)
    for target, source in zip(tensor_list, gathered, strict=True):
        target.copy_(source[: target.shape[0]])
    return _Done() if async_op else None


def _reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """torch.distributed.reduce_scatter, over gloo also with first dimensions that differ, as NCCL does."""
    rows = [each.shape[0] if each.dim() else 1 for each in input_list]
    if len(set(rows)) == 1:
        return dist.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    padded = output.new_zeros(len(rows), max(rows), *output.shape[1:])
    for target, source in zip(padded, input_list, strict=True):
        target[: source.shape[0]] = source
    mine = torch.empty_like(padded[0])
    dist.reduce_scatter_tensor(mine, padded.flatten(0, 1), op=op, group=group)
    output.copy_(mine[: output.shape[0]])
    return _Done() if async_op else None


class _Done:
    """The handle of a collective that has already finished."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _load(*args: Any, **kwargs: Any) -> Any:
    if is_cuda_device(kwargs.get("map_location")):
        kwargs["map_location"] = CPU
    return torch.load(*args, **kwargs)


def _device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        multi_processor_count=psutil.cpu_count() or 1,
        total_memory=psutil.virtual_memory().total,
    )


def _memory_info(device: Any = None) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _resident_bytes(device: Any = None) -> int:
    return int(psutil.Process().memory_info().rss)


RANDOM = {
    # One generator plays both the CPU's and the GPU's: CPU dropout draws from it.
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
    "manual_seed_all": lambda seed: torch.default_generator.manual_seed(int(seed)),
    "initial_seed": torch.initial_seed,
}
NVTX = {"range_push": _nothing, "range_pop": _nothing, "mark": _nothing, "range": _no_context}
MEMORY = {
    "memory_stats": lambda device=None: defaultdict(int),
    "memory_allocated": _resident_bytes,
    "max_memory_allocated": _resident_bytes,
    "memory_reserved": _resident_bytes,
    "max_memory_reserved": _resident_bytes,
    "reset_peak_memory_stats": _nothing,
    "mem_get_info": _memory_info,
    "empty_cache": _nothing,
}
CUDA = {
    # Megatron passes the result on as a device, so it must be one; a bare index would mean a GPU.
    "current_device": lambda: CPU,
    "set_device": _nothing,
    "device": _no_context,
    "synchronize": _nothing,
    "is_current_stream_capturing": lambda: False,
    "Stream": Stream,
    "ExternalStream": Stream,
    "Event": Event,
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "set_stream": _nothing,
    "stream": _no_context,
    "default_generators": _Generators(),
    "_lazy_call": lambda call, **_: call(),
    "_lazy_init": _nothing,
    "get_device_properties": _device_properties,
    "get_device_capability": lambda device=None: (0, 0),
    **RANDOM,
    **MEMORY,
}
DISTRIBUTED = {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter}
TORCH = {
    **{name: _on_cpu(getattr(torch, name)) for name in TENSOR_FACTORIES},
    "load": _load,
    "compile": _uncompiled,
}


def overlay() -> dict[str, Overlay]:
    """Return the stand-in of each real module, by the real module's name."""
    nvtx = Overlay(torch.cuda.nvtx, NVTX)
    random = Overlay(torch.cuda.random, RANDOM)
    memory = Overlay(torch.cuda.memory, MEMORY)
    cuda = Overlay(torch.cuda, {**CUDA, "nvtx": nvtx, "random": random, "memory": memory})
    jit = Overlay(torch.jit, {"script": _uncompiled})
    distributed = Overlay(torch.distributed, DISTRIBUTED)
    top = Overlay(torch, {**TORCH, "cuda": cuda, "jit": jit, "distributed": distributed})
    return {module.__name__: module for module in (nvtx, random, memory, cuda, jit, distributed, top)}
