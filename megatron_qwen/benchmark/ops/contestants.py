"""Who takes part in a measurement: our backends, torch eager and compiled, and the peers that are installed.

Nobody is left out in silence: one that cannot run is listed with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function, OpCase
from megatron_qwen.errors import ConfigError

OURS = ("cuda", "triton", "reference")
PEERS = (
    "torch", "compile", "aten", "grouped_mm", "liger", "te",
    "cudnn", "flash", "fa3", "three_call", "three_call_fa3", "per_head",
)  # fmt: skip

# peer: the module it needs, and how that is installed; those not listed come with torch
_MODULES = {
    "liger": ("liger_kernel", "pip install liger-kernel"),
    "te": ("transformer_engine", "pip install transformer-engine[pytorch]"),
    "fa3": ("fa3_fwd_interface", "pip install fa3-fwd"),
    "three_call_fa3": ("fa3_fwd_interface", "pip install fa3-fwd"),
}
_GPU_ONLY = "cudnn", *_MODULES


@dataclass(frozen=True, kw_only=True)
class OpContestant:
    """One side of a measurement.

    Attributes:
        name: of `OURS` or `PEERS`.
        is_ours: whether it is one of our backends.
        function: computes the case; None if it does not take part.
        missing: why it does not.
    """

    name: str
    is_ours: bool
    function: Function | None = None
    missing: str = ""

    def scope(self) -> AbstractContextManager[None]:
        """Return the context to call the function and its gradient in."""
        return ops.use_backend(self.name) if self.is_ours else contextlib.nullcontext()


def default_backends(device: torch.device, *, interpreted: bool) -> tuple[str, ...]:
    """Return our backends that are measured unless others are asked for."""
    if device.type == "cuda":
        return ("cuda", "triton")
    return ("triton",) if interpreted else ("reference",)


def check_names(backends: Sequence[str], versus: Sequence[str]) -> None:
    """Raise ConfigError for an unknown backend or peer."""
    for option, given, known in (("--backend", backends, OURS), ("--vs", versus, PEERS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"{option} {name!r}: expected one of {', '.join(known)}")


def take_part(
    case: OpCase, device: torch.device, dtype: torch.dtype, backends: Sequence[str], versus: Sequence[str]
) -> list[OpContestant]:
    """Return our contestants, then the peers named in `versus`, each with a function or a reason."""
    return [
        *(_our_contestant(case, device, dtype, name) for name in backends),
        *(_peer(case, device, name) for name in versus),
    ]


def _our_contestant(case: OpCase, device: torch.device, dtype: torch.dtype, name: str) -> OpContestant:
    with ops.use_backend(name):
        try:
            ops.explain_choice(case.operation, device, dtype)
        except ConfigError as error:
            return OpContestant(name=name, is_ours=True, missing=str(error))
    return OpContestant(name=name, is_ours=True, function=case.ours)


def _peer(case: OpCase, device: torch.device, name: str) -> OpContestant:
    if name in ("torch", "compile") and not case.is_plain_timed:
        return OpContestant(name=name, is_ours=False, missing="plain torch is the definition here, and not timed")
    if name == "torch":
        return OpContestant(name=name, is_ours=False, function=case.plain)
    if name == "compile" and not case.is_compilable:
        return OpContestant(name=name, is_ours=False, missing="plain torch reads numbers of rows on the host here")
    if name == "compile":
        # One shape per call of this function; torch counts shapes per function and gives up after eight.
        torch.compiler.reset()
        return OpContestant(name=name, is_ours=False, function=torch.compile(case.plain, fullgraph=True, dynamic=False))
    if name not in case.peers:
        return OpContestant(name=name, is_ours=False, missing="has no such operation")
    if name in _MODULES:
        module, hint = _MODULES[name]
        if importlib.util.find_spec(module) is None:
            return OpContestant(name=name, is_ours=False, missing=f"not installed ({hint})")
    if name in _GPU_ONLY and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return OpContestant(name=name, is_ours=False, missing="its kernels run on a GPU only")
    try:
        return OpContestant(name=name, is_ours=False, function=case.peers[name]())
    except Exception as error:  # another project's import may fail in any way; that is a line of the report
        return OpContestant(name=name, is_ours=False, missing=f"{type(error).__name__}: {error}")
