"""Facts about the source tree that a change can break without any other test noticing."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from source_tree import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML since Python 3.11")

HEAVY = ("torch", "megatron", "transformers", "triton", "tokenizers", "numpy")


def test_the_kernels_link_is_relative_and_the_folder_is_no_package_of_its_own() -> None:
    link = ROOT / "megatron_qwen" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_setup_py_stays_a_thin_call_of_cmake() -> None:
    assert len((ROOT / "setup.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_test_files_have_different_names() -> None:
    """Without packages under tests/, pytest imports every test file by its bare name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name, count in names.items() if count > 1 and name != "conftest.py"} == set()


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_pins_satisfy_the_project_for_every_supported_python(version: str) -> None:
    lines = (ROOT / "requirements" / f"py{version.replace('.', '')}.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name == "megatron-qwen":
            continue
        environment = {"python_version": version, "platform_system": "Linux"}
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        name = requirement.name.lower()
        assert name in pins, f"{name} has no pin: make lock PYTHON=python{version}"
        assert Version(pins[name]) in requirement.specifier, f"{name}=={pins[name]} does not satisfy {requirement}"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_qwen.cli.app import build_app; build_app(); "
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
