"""What can be shown of csrc without a GPU: it compiles for sm_80 and sm_90a without spills, with 16-byte accesses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(TOOLKIT))
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH, under CUDA_HOME or /usr/local/cuda")


def machine_code(library: Path) -> str:
    """SASS of `library`, by the tools of the toolkit or those that the development requirements install."""
    packaged = [str(Path(entry) / "nvidia/cu13/bin") for entry in sys.path if entry]
    path = os.pathsep.join([os.environ["PATH"], str(TOOLKIT), *packaged])
    cuobjdump = shutil.which("cuobjdump", path=path)
    assert cuobjdump, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    command = [cuobjdump, "-sass", str(library)]
    return subprocess.run(command, env={**os.environ, "PATH": path}, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CMake build folder and its log."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "PATH": TOOLS}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DMEGATRON_QWEN_CUDA=on"]
    log = ""
    for command in (
        [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(folder)],
        ["ctest", "--test-dir", str(folder), "--output-on-failure"],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        log += result.stdout + result.stderr
        assert result.returncode == 0, log
    return folder, log


def test_no_kernel_spills_registers_on_any_architecture(build: tuple[Path, str]) -> None:
    log = build[1]
    compiled = set(re.findall(r"Compiling entry function '\w*copy_bandwidth_kernel\w*' for '(sm_\w+)'", log))
    assert compiled == {"sm_80", "sm_90a"}
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills
    assert set(spills) == {("0", "0", "0")}


def test_the_copy_reads_and_writes_16_bytes_per_instruction(build: tuple[Path, str]) -> None:
    listing = machine_code(build[0] / "libmegatron_qwen_kernels.a")
    per_architecture = dict(re.findall(r"code for (sm_\w+)\n((?:(?!code for ).)*)", listing, flags=re.DOTALL))
    assert set(per_architecture) == {"sm_80", "sm_90a"}
    for architecture, code in per_architecture.items():
        for access in ("LDG", "STG"):
            wide = len(re.findall(rf"\b{access}\.E[.\w]*\.128\b", code))
            every = len(re.findall(rf"\b{access}\.E", code))
            # 4 unrolled and 1 of the remainder loop; the only narrow access is the tail of fewer than 16 bytes
            assert (wide, every) == (5, 6), f"{access} on {architecture}"


def test_ctest_ran_the_host_checks(build: tuple[Path, str]) -> None:
    assert re.search(r"host \.+\s+Passed", build[1])


def run_module(folder: Path, code: str) -> str:
    """Run `code` after `import _C` of the CUDA build, in a process of its own."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport _C\n{code}"
    result = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_cuda_build_imports_without_a_gpu_and_lists_its_architectures(build: tuple[Path, str]) -> None:
    printed = run_module(build[0], "info = _C.build_info(); print(info['cuda_compiled'], *info['cuda_architectures'])")
    assert printed == "True 80 90a-real"


def test_without_a_device_the_copy_fails_with_the_words_of_cuda(build: tuple[Path, str]) -> None:
    code = """
try:
    _C.copy_bandwidth(0x1000, 0x2000, 16)
except (RuntimeError, ValueError) as error:
    print(error)
"""
    printed = run_module(build[0], code)
    # With a GPU these invented addresses are refused as host memory, without one the driver is missing.
    assert "copy_bandwidth: " in printed
    assert "cudaError" in printed or "host memory" in printed
