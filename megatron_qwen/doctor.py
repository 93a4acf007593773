"""What is installed here, which backend each part would use and why: the content of `megatron-qwen doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, StorageError
from megatron_qwen.leftovers import Leftover, find_leftovers

# distribution: (required, what it means when it is missing)
PACKAGES: dict[str, tuple[bool, str]] = {
    "torch": (True, "nothing runs"),
    "megatron-core": (True, "no training, conversion or inference"),
    "transformers": (True, "no comparison with Hugging Face; everything else runs"),
    "tokenizers": (True, "no text in or out"),
    "safetensors": (True, "no Hugging Face weights"),
    "triton": (False, "no Triton kernels; megatron-core 0.17 and newer does not import without it"),
    "transformer-engine": (False, "Megatron's layers run on torch; no FP8"),
    "apex": (False, "no fused gradient accumulation outside Transformer Engine"),
    "flash-attn": (False, "attention runs on Transformer Engine or torch"),
    "nvidia-modelopt": (False, "no quantization"),
    "tensorboard": (False, "metrics go to JSONL only"),
    "pyarrow": (False, "`data prepare` reads no Parquet"),
}
# `apex` on the package index is another project: NVIDIA's is recognised by its module.
IMPORT_NAMES = {"apex": "apex.optimizers", "transformer-engine": "transformer_engine", "flash-attn": "flash_attn"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """One distribution: version None means not installed; `consequence` then says what that costs."""

    name: str
    version: str | None
    required: bool
    consequence: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which backend a part would use on this machine, and why."""

    part: str
    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that `doctor` reports; sizes in bytes."""

    python: str
    platform: str
    packages: tuple[Package, ...]
    cpu: str
    cpu_cores: int
    memory_bytes: int
    gpus: tuple[dict[str, Any], ...]
    nvcc: str | None
    choices: tuple[Choice, ...]
    searched: tuple[str, ...]
    leftovers: tuple[Leftover, ...]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, for JSON."""
        return asdict(self)


def diagnose(*folders: Path) -> Diagnosis:
    """Look at this environment, and for half-written outputs under `folders`.

    Raises:
        StorageError: one of them is not a folder.
    """
    import psutil

    for folder in folders:
        if not folder.is_dir():
            raise StorageError(f"{folder}: not a folder; give the one to search for half-written outputs")
    packages = tuple(_package(name, *facts) for name, facts in PACKAGES.items())
    installed = {package.name: package.version for package in packages}
    problems = [
        f"{package.name} is not installed: {package.consequence}" for package in packages if _is_missing(package)
    ]
    problems += _version_problems(installed)
    return Diagnosis(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=packages,
        cpu=_cpu_name(),
        cpu_cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=_gpus() if installed["torch"] else (),
        nvcc=_nvcc(),
        choices=_choices() if not problems else (),
        searched=tuple(map(str, folders)),
        leftovers=tuple(find_leftovers(folders)),
        problems=tuple(problems),
    )


def _is_missing(package: Package) -> bool:
    return package.required and package.version is None


def _package(name: str, required: bool, consequence: str) -> Package:
    try:
        version: str | None = importlib.metadata.version(name)
        if name in IMPORT_NAMES and not _can_find(IMPORT_NAMES[name]):
            version = None
    except importlib.metadata.PackageNotFoundError:
        version = None
    return Package(name=name, version=version, required=required, consequence=consequence)


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the parent package is missing
        return False


def _version_problems(installed: dict[str, str | None]) -> list[str]:
    if not installed["megatron-core"]:
        return []
    from megatron_qwen import compat

    try:
        compat.megatron_version()
    except ConfigError as error:
        return [str(error)]
    return []


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> tuple[dict[str, Any], ...]:
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(
        {"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
        for gpu in devices
    )


def _nvcc() -> str | None:
    folders = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    search = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders if folder)])
    return shutil.which("nvcc", path=search)


def _choices() -> tuple[Choice, ...]:
    import torch

    from megatron_qwen import ops
    from megatron_qwen.parallel.device import communication_backend

    on_gpu = torch.cuda.is_available()
    with_te = on_gpu and _can_find("transformer_engine")
    why = "Transformer Engine is installed and CUDA is there" if with_te else _why_not_te(on_gpu)
    te, local = ("te", "Transformer Engine"), ("local", "torch")
    layers, engine = te if with_te else local
    attention = engine if with_te else "torch scaled_dot_product_attention"
    experts = "Transformer Engine, grouped GEMM" if with_te else "ops.grouped_mlp: a rank's experts in one operation"
    backend = communication_backend()
    return (
        Choice(part="layer specification", backend=layers, reason=why),
        Choice(part="norm", backend=engine, reason=why),
        Choice(part="attention", backend=attention, reason=why),
        Choice(part="experts", backend=experts, reason=why),
        Choice(part="communication", backend=backend, reason="CUDA is there" if on_gpu else "no CUDA device"),
        Choice(part="optimizer", backend=_adam(on_gpu), reason="the first of Transformer Engine, apex, torch"),
        _extension_choice(),
        *(Choice(part=f"op {each.op}", backend=each.backend, reason=each.reason) for each in ops.choices()),
    )


def _why_not_te(on_gpu: bool) -> str:
    return "Transformer Engine is not installed" if on_gpu else "no CUDA device; Transformer Engine needs one"


def _adam(on_gpu: bool) -> str:
    if on_gpu and _can_find("transformer_engine"):
        return "Transformer Engine FusedAdam"
    return (
        "apex FusedAdam" if on_gpu and _can_find("apex.optimizers") else "torch's fused AdamW, state laid out as apex's"
    )


def _extension_choice() -> Choice:
    try:
        extension = importlib.import_module("megatron_qwen._C")
    except ImportError as error:
        return Choice(part="extension _C", backend="not built", reason=f"{error}; reinstall where a C++ compiler is")
    info = extension.build_info()
    if info["cuda_compiled"]:
        architectures = ", ".join(info["cuda_architectures"])
        return Choice(part="extension _C", backend="CUDA", reason=f"CUDA {info['cuda_compiler']} for {architectures}")
    reason = "built where no driver and nvcc were found, or with MEGATRON_QWEN_CUDA=off"
    return Choice(part="extension _C", backend="host only", reason=f"{reason}; {info['cxx_compiler']}")
