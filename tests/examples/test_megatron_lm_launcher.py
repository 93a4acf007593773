"""The Megatron-LM launcher: every layout it offers can run and fits, and the command it starts is the right one."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_qwen.model.config import QwenConfig
from megatron_qwen.model.flags import megatron_lm_flags
from megatron_qwen.model.parameters import count_parameters
from megatron_qwen.parallel.layout import check_layout

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FOLDER = EXAMPLES / "megatron_lm"


def load_checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_layouts", FOLDER / "check_layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_layouts"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


checker = load_checker()
ROWS = checker.read_table()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.settings.world_size}")
def test_every_layout_is_valid_and_fits_an_h100(row: checker.Row) -> None:  # type: ignore[name-defined]
    config, settings = QwenConfig.from_preset(row.model), row.settings
    check_layout(
        settings.layout,
        config.shape(),
        world_size=settings.world_size,
        seq_length=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        global_batch_size=settings.global_batch_size,
        overlap_p2p=settings.layout.vpp > 1,
    )
    assert megatron_lm_flags(config, settings).words()
    assert checker.estimate_bytes(config, settings) < checker.LIMIT_BYTES
    ranks_that_talk_most = max(settings.layout.tp, settings.layout.ep * settings.layout.expert_tensor_parallel_size)
    assert ranks_that_talk_most <= 8, "tensor and expert parallel groups stay inside a node"


def test_every_size_has_a_layout_up_to_512_gpus() -> None:
    with (FOLDER / "layouts.csv").open(newline="") as lines:
        table = {(line["model"], int(line["gpus"])) for line in csv.DictReader(lines)}
    for model in ("0.5b", "1.5b", "3b", "7b", "14b"):
        assert all((f"qwen2.5-{model}", gpus) in table for gpus in (8, 16, 32, 64, 128, 256, 512))
    for model in ("qwen2.5-32b", "qwen2.5-72b", "qwen1.5-moe-a2.7b", "qwen2-57b-a14b"):
        assert all((model, gpus) in table for gpus in (32, 64, 128, 256, 512))


def test_the_estimate_counts_every_parameter_once() -> None:
    """With no activations (0 samples) and many replicas what is left is 6 bytes per parameter."""
    for name in ("qwen2.5-7b", "qwen1.5-moe-a2.7b"):
        config = QwenConfig.from_preset(name)
        settings = checker.LaunchSettings(world_size=10**9, micro_batch_size=0)
        assert checker.estimate_bytes(config, settings) / 6 == pytest.approx(count_parameters(config).total, rel=2e-3)


def test_a_large_model_on_one_node_would_not_pass() -> None:
    config = QwenConfig.from_preset("qwen2.5-72b")
    settings = checker.LaunchSettings(layout=checker.ParallelLayout(tp=8, sequence_parallel=True), world_size=8)
    assert checker.estimate_bytes(config, settings) > 2 * checker.LIMIT_BYTES


def dry_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(FOLDER / "pretrain.sh"), *arguments],
        env={**os.environ, "PATH": path, "DRY_RUN": "1", "MEGATRON_LM": "/checkout", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("model", ["qwen2.5-7b", "qwen2-57b-a14b"])
def test_the_launcher_starts_pretrain_gpt_with_our_flags(model: str) -> None:
    (row,) = [row for row in ROWS if (row.model, row.settings.world_size) == (model, 64)]
    result = dry_run(model, "64", "/a tokenizer", "/data", "/out", "--exit-interval", "3")
    assert result.returncode == 0, result.stderr
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {result.stdout}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[0] == "torchrun"
    assert words[words.index("--nnodes") + 1] == "8"
    assert "/checkout/pretrain_gpt.py" in words
    flags = megatron_lm_flags(QwenConfig.from_preset(model), row.settings).words()
    joined = "\n".join(words)
    for group in checker.megatron_lm_flags(QwenConfig.from_preset(model), row.settings).groups.values():
        assert set(group) <= set(words)
    assert "--tokenizer-model\n/a tokenizer\n" in joined
    assert len(flags) < len(words)
    assert words[-2:] == ["--exit-interval", "3"]


def test_an_unknown_row_is_refused_with_the_ones_there_are() -> None:
    result = dry_run("qwen2.5-72b", "8", "/t", "/d", "/o")
    assert result.returncode == 2
    assert "no layout for qwen2.5-72b on 8 GPUs" in result.stderr
    assert "qwen2.5-72b,32" in result.stderr


def test_without_arguments_the_launcher_explains_itself() -> None:
    result = dry_run()
    assert result.returncode == 2
    assert "MODEL GPUS TOKENIZER_DIR DATA_PREFIX OUT_DIR" in result.stderr


@pytest.mark.parametrize("script", [FOLDER / "pretrain.sh", EXAMPLES / "slurm" / "pretrain.sbatch"])
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
