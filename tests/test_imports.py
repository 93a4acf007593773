"""The light import, and the one direction in which layers may import one another."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_qwen"
KERNELS = PACKAGE / "kernels"  # a link, which rglob does not follow
HEAVY = ("torch", "megatron", "transformers", "triton")

# What each layer must not import; `cli` and `testing` may use everything.
UPPER = {"cli", "recipes", "training", "conversion", "inference", "evaluation", "quantization", "benchmark"}
FORBIDDEN = {
    "errors": UPPER | {"model", "ops", "kernels", "parallel", "checkpoint", "data", "testing", "compat"},
    "compat": UPPER | {"model", "ops", "kernels", "checkpoint", "data", "testing"},
    "kernels": UPPER | {"model", "ops", "parallel", "checkpoint", "data", "testing"},
    "ops": UPPER | {"model", "checkpoint", "data", "testing"},
    "model": UPPER | {"checkpoint", "data", "testing"},
    "parallel": UPPER | {"model", "ops", "kernels", "checkpoint", "data", "testing"},
    "checkpoint": UPPER | {"model", "ops", "kernels", "data"},
    "data": UPPER | {"model", "ops", "kernels"},
    "planning": UPPER | {"model", "ops", "kernels", "checkpoint", "data", "testing"},
    "conversion": {"cli", "recipes", "training"},
    "inference": {"cli", "recipes", "training"},
    "training": {"cli"},
    "recipes": {"cli"},
    "benchmark": {"cli"},
    "evaluation": {"cli", "recipes"},
    "quantization": {"cli", "recipes"},
}


def imported_names(source: str, module: str) -> set[str]:
    """Dotted names that a module's import statements name, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def violations(source: str, module: str) -> list[str]:
    layer = module.split(".")[1]
    barred = FORBIDDEN.get(layer, set())
    if layer not in ("ops", "kernels"):
        barred = barred | {"kernels"}  # ops.py is the only door
    return sorted(
        name
        for name in imported_names(source, module)
        if name.startswith("megatron_qwen.") and name.split(".")[1] in barred
    )


def modules() -> list[Path]:
    found = {*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")}
    return sorted(path for path in found if len(path.relative_to(PACKAGE).parts) > 1 or path.stem in FORBIDDEN)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers_point_one_way(path: Path) -> None:
    module = ".".join(["megatron_qwen", *path.relative_to(PACKAGE).with_suffix("").parts])
    assert violations(path.read_text(), module) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from megatron_qwen.training import loop",
        "import megatron_qwen.cli.app",
        "def f():\n    from megatron_qwen import conversion",
        "from ..training.loop import train",
    ],
)
def test_the_check_sees_every_form_of_import(statement: str) -> None:
    assert violations(statement, "megatron_qwen.model.build")


def test_kernels_are_reached_through_ops_only() -> None:
    statement = "from megatron_qwen.kernels.swiglu import swiglu"
    assert violations(statement, "megatron_qwen.testing.tiny")
    assert not violations(statement, "megatron_qwen.ops")
    assert violations("from ... import ops", "megatron_qwen.kernels.swiglu.op")


def test_operations_work_where_triton_is_not_imported() -> None:
    code = (
        "import sys; from megatron_qwen import ops; "
        "print([name for name in ('triton', 'megatron') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_layout_rules_know_no_torch() -> None:
    names = imported_names((PACKAGE / "parallel" / "layout.py").read_text(), "megatron_qwen.parallel.layout")
    assert not {name.split(".")[0] for name in names} & set(HEAVY)


@pytest.mark.parametrize(
    "statement", ["import megatron_qwen", "from megatron_qwen.parallel.layout import check_layout"]
)
def test_import_is_light(statement: str, tmp_path: Path) -> None:
    code = (
        f"import sys, time; start = time.process_time(); {statement}; seconds = time.process_time() - start; "
        f"print(seconds, [name for name in {HEAVY} if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    seconds, loaded = run.stdout.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.3
