"""Builds megatron_qwen._C with the CMakeLists.txt beside this file; everything else is in pyproject.toml.

MEGATRON_QWEN_CUDA=auto|on|off (default auto: CUDA kernels only where an NVIDIA driver and nvcc are found).
Without a C++ compiler the package installs without the extension, and `megatron-qwen doctor` says so;
MEGATRON_QWEN_CUDA=on makes that, like any other build failure, an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA_CHOICE = os.environ.get("MEGATRON_QWEN_CUDA", "auto").lower()


class CMakeBuild(build_ext):
    """Runs CMake once and leaves the one module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build `ext`; raises CompileError, which setuptools forgives for an optional extension."""
        import pybind11  # in the build environment, not in the environment that only reads this file

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        # Nothing is taken over from an earlier build: its tools may have lived in an environment that is gone.
        shutil.rmtree(build_dir, ignore_errors=True)
        target.unlink(missing_ok=True)
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build_dir)),
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            f"-DMEGATRON_QWEN_CUDA={CUDA_CHOICE}",
            "-DMEGATRON_QWEN_TESTS=OFF",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build_dir), "--target", "_C"], check=True)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            raise CompileError(f"megatron_qwen._C was not built: {error}") from error
        if not target.exists():
            raise CompileError(f"CMake finished, but {target} is not there; found {list(target.parent.glob('_C*'))}")


setup(
    ext_modules=[Extension("megatron_qwen._C", sources=[], optional=CUDA_CHOICE != "on")],
    cmdclass={"build_ext": CMakeBuild},
)
