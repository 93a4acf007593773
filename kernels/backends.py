"""Which backend an operation runs on, and why.

`MEGATRON_QWEN_BACKEND` or `use_backend` asks for one; a request that cannot be met is an error that names the
reason. "auto" chooses by a rule with a reason, which `megatron-qwen doctor` prints:

1. tensors that are not on a CUDA device, and float64: the reference, in torch;
2. CUDA, where the extension has the kernel and the (operation, architecture) pair is in `validated.py`;
3. Triton, where it is installed;
4. the reference, with one line in the log.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from ..errors import ConfigError
from .validated import VALIDATED

logger = logging.getLogger(__name__)

VARIABLE = "MEGATRON_QWEN_BACKEND"
BACKENDS = ("auto", "cuda", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every operation, and the backends it has besides the reference.
OPERATIONS: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True, kw_only=True)
class OpChoice:
    """The backend that one operation takes ("cuda", "triton" or "reference"), and the reason."""

    op: str
    backend: str
    reason: str


class _Override:
    """What `use_backend` set; None outside it."""

    backend: str | None = None


def register_operation(name: str, *kernels: str) -> None:
    """List an operation and the kernels it has: "cuda", "triton" or both."""
    OPERATIONS[name] = kernels


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Take `backend` ("auto", "cuda", "triton", "reference") inside the block, whatever the environment says.

    It holds for the whole process, not for one thread: backward passes of CUDA tensors run in autograd's threads.

    Raises:
        ConfigError: an unknown name.
    """
    previous, _Override.backend = _Override.backend, _known(backend, "use_backend")
    try:
        yield
    finally:
        _Override.backend = previous


def requested_backend() -> str:
    """Return what `use_backend` or MEGATRON_QWEN_BACKEND asks for; "auto" if neither does.

    Raises:
        ConfigError: the variable holds an unknown name.
    """
    return _Override.backend or _known(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _known(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise ConfigError(f"{where}: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    return backend


def backend_for(op: str, tensor: torch.Tensor, unfit: str = "", unfit_for_cuda: Callable[[], str] | None = None) -> str:
    """Return "cuda", "triton" or "reference" for this call of `op`.

    Args:
        op: name of a registered operation.
        tensor: the input that decides by its device and dtype.
        unfit: why no kernel can take these inputs (a size beyond its limits); empty if they can.
        unfit_for_cuda: says the same of the CUDA kernel alone; asked only where that would be taken.

    Raises:
        ConfigError: the requested backend cannot run it; the message says why.
    """
    request = requested_backend()
    # The common case on a CPU, where a call of a small operation takes microseconds.
    if request == "reference" or (request == "auto" and tensor.device.type != "cuda"):
        return "reference"
    backend = _choose(op, request, tensor.device, tensor.dtype, unfit).backend
    if backend == "cuda" and unfit_for_cuda is not None and (obstacle := unfit_for_cuda()):
        return _choose(op, request, tensor.device, tensor.dtype, unfit, obstacle).backend
    return backend


def unfit_dtype(name: str, tensor: torch.Tensor | None) -> str:
    """Return why no kernel can take this further input, which may have a dtype of its own; empty if it can."""
    if tensor is None or tensor.dtype in KERNEL_DTYPES:
        return ""
    return f"{name} has dtype {tensor.dtype}, and kernels take float32, bfloat16 and float16"


def launches(op: str, backend: str) -> ModuleType:
    """Return the module with the launch functions of `op` for "triton" or "cuda"; both take the same arguments."""
    return importlib.import_module(f".{op}.{'cuda' if backend == 'cuda' else 'kernel'}", __package__)


def explain_choice(op: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> OpChoice:
    """Return the choice for tensors of this device and dtype, with its reason.

    Raises:
        ConfigError: see `backend_for`.
    """
    return _choose(op, requested_backend(), device, dtype, "")


@functools.lru_cache(maxsize=512)
def _choose(
    op: str, request: str, device: torch.device, dtype: torch.dtype, unfit: str, unfit_for_cuda: str = ""
) -> OpChoice:
    obstacles = {name: _obstacle(op, name, device, dtype) or unfit for name in ("cuda", "triton")}
    obstacles["cuda"] = obstacles["cuda"] or unfit_for_cuda
    if request == "auto":
        return _choose_freely(op, device, dtype, obstacles)
    if request == "reference":
        return OpChoice(op=op, backend="reference", reason="requested")
    if obstacles[request]:
        raise ConfigError(
            f"{op}: backend {request!r} was requested, but {obstacles[request]}; "
            f"set {VARIABLE} (or use_backend) to auto or reference"
        )
    return OpChoice(op=op, backend=request, reason="requested")


def _choose_freely(op: str, device: torch.device, dtype: torch.dtype, obstacles: dict[str, str]) -> OpChoice:
    if device.type != "cuda":
        return OpChoice(op=op, backend="reference", reason=f"tensors on {device.type}: torch")
    if dtype not in KERNEL_DTYPES:
        return OpChoice(op=op, backend="reference", reason=f"{dtype}: kernels compute in float32")
    architecture = _architecture(device)
    if not obstacles["cuda"] and (op, architecture) in VALIDATED:
        return OpChoice(op=op, backend="cuda", reason=f"validated on {architecture}")
    why_not_cuda = obstacles["cuda"] or f"its CUDA kernel is not yet validated on {architecture}"
    if not obstacles["triton"]:
        return OpChoice(op=op, backend="triton", reason=why_not_cuda)
    reason = f"{why_not_cuda}; {obstacles['triton']}"
    logger.warning("%s runs on torch: %s", op, reason)
    return OpChoice(op=op, backend="reference", reason=reason)


def _obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `backend` cannot run `op` on tensors of this device and dtype; empty if it can."""
    if backend not in OPERATIONS[op]:
        return f"{op} has no {'CUDA' if backend == 'cuda' else 'Triton'} kernel"
    if dtype not in KERNEL_DTYPES:
        return f"kernels take float32, bfloat16 and float16, not {dtype}"
    if backend == "cuda":
        return _cuda_obstacle(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return ""
    return f"the tensors are on {device.type}, where Triton runs only in its interpreter (TRITON_INTERPRET=1)"


def _cuda_obstacle(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a CUDA device"
    try:
        from .. import _C
    except ImportError:
        return "the extension megatron_qwen._C is not built"
    return "" if _C.build_info()["cuda_compiled"] else "the extension was built without CUDA (MEGATRON_QWEN_CUDA=on)"


def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
