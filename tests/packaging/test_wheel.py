"""The wheel and the sdist hold what they must, and the wheel imports with nothing else installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_tree import copy_sources

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
PIP_WHEEL = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]


def build_wheel(source: Path, output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this environment
    return subprocess.run(
        [*PIP_WHEEL, "-w", str(output), str(source)],
        env={**os.environ, "PATH": tools, "MEGATRON_QWEN_CUDA": "auto", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_sources(tmp_path_factory.mktemp("source") / "tree")
    probe = folder / "kernels" / "probe"
    probe.mkdir()
    (probe / "__init__.py").write_text("NAME = 'probe'\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    result = build_wheel(source, output)
    assert result.returncode == 0, result.stderr
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=120)
    return target


def run_bare(installed: Path, empty: Path, code: str) -> str:
    """Run `code` from an empty folder, with the wheel's folder and the standard library on sys.path and no more."""
    program = f"import sys; sys.path.append({str(installed)!r})\n{code}"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=empty, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_wheel_imports_from_an_empty_folder_without_any_dependency(installed: Path, tmp_path: Path) -> None:
    output = run_bare(
        installed, tmp_path, "import megatron_qwen; print(megatron_qwen.__file__, megatron_qwen.__version__)"
    )
    assert output.startswith(str(installed))
    assert output.endswith("0.1.0")


def test_kernels_are_real_files_in_the_wheel_and_no_top_level_package(
    wheel: Path, installed: Path, tmp_path: Path
) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "megatron_qwen/kernels/probe/__init__.py" in names
    assert {f"megatron_qwen/kernels/{name}.py" for name in ("backends", "swiglu/op", "swiglu/kernel")} <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"megatron_qwen"}
    assert run_bare(installed, tmp_path, "from megatron_qwen.kernels import probe; print(probe.NAME)") == "probe"


def test_wheel_holds_type_information_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {"megatron_qwen/py.typed", "megatron_qwen/_C.pyi"} <= set(names)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "megatron-qwen = megatron_qwen.cli.app:main" in archive.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: the extension is optional")
def test_wheel_extension_needs_no_gpu_and_says_what_it_is(installed: Path, tmp_path: Path) -> None:
    output = run_bare(installed, tmp_path, "from megatron_qwen import _C; print(_C.build_info()['version'])")
    assert output == "0.1.0"


def test_without_a_compiler_the_package_installs_without_the_extension(source: Path, tmp_path: Path) -> None:
    result = build_wheel(source, tmp_path, CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MEGATRON_QWEN_CUDA": "on", "CXX": "/nonexistent/c++"}, "was not built"),
        ({"MEGATRON_QWEN_CUDA": "on", "CUDAARCHS": "80", "CUDACXX": "/nonexistent/nvcc"}, "was not built"),
    ],
)
def test_cuda_on_makes_a_failed_build_an_error(
    source: Path, tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    result = build_wheel(source, tmp_path, **environment)
    assert result.returncode != 0
    assert words in result.stderr + result.stdout


def test_sdist_holds_the_sources_of_the_extension_and_the_kernels(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    for name in ("CMakeLists.txt", "setup.py", "csrc/kernels/copy_bandwidth.cu", "csrc/bindings/module.cpp", "LICENSE"):
        assert name in members
    assert members["megatron_qwen/kernels/probe/__init__.py"].isfile()
