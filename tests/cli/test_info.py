"""`doctor`, `models` and `flags` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qwen.model.presets import PRESETS
from megatron_qwen.testing.tiny import tiny_moe, write_tiny_hf


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_qwen", *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_doctor_reports_versions_choices_and_leftovers(tmp_path: Path) -> None:
    (tmp_path / "run" / "iter_0000010.incomplete-ab12").mkdir(parents=True)
    (tmp_path / "run" / "iter_0000010.incomplete-ab12" / "x.incomplete-1").touch()
    result = run("doctor", str(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["torch"]
    assert versions["megatron-core"]
    assert {choice["part"] for choice in report["choices"]} >= {"norm", "attention", "experts", "communication"}
    assert all(choice["reason"] for choice in report["choices"])
    (leftover,) = report["leftovers"]
    assert leftover["path"] == str(tmp_path / "run" / "iter_0000010.incomplete-ab12")
    assert "the next run" in leftover["advice"]
    assert report["problems"] == []


def test_doctor_says_what_a_missing_package_costs(tmp_path: Path) -> None:
    report = json.loads(run("doctor", str(tmp_path), "--json").stdout)
    for package in report["packages"]:
        assert package["consequence"]
        assert package["version"] or not package["required"]


def test_doctor_table_shows_the_reason_of_every_choice(tmp_path: Path) -> None:
    result = run("doctor", str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = json.loads(run("doctor", str(tmp_path), "--json").stdout)
    for choice in report["choices"]:
        assert choice["reason"] in result.stdout


def test_doctor_of_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    result = run("doctor", str(tmp_path / "nowhere"))
    assert result.returncode == 4
    assert "nowhere: not a folder" in result.stderr


def test_models_lists_every_preset_with_its_exact_count() -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert [row["name"] for row in rows] == list(PRESETS)
    counts = {row["name"]: (row["parameters"], row["active_parameters"]) for row in rows}
    assert counts["qwen2.5-0.5b"] == (494_032_768, 494_032_768)
    assert counts["qwen2.5-72b"] == (72_706_203_648, 72_706_203_648)
    assert counts["qwen1.5-moe-a2.7b"] == (14_315_784_192, 2_689_173_504)
    assert counts["qwen2-57b-a14b"] == (57_408_658_944, 14_249_270_784)
    table = run("models").stdout
    assert all(f"{row['parameters']:,}" in table for row in rows)


def test_models_show_reads_a_hugging_face_folder(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "model", tiny_moe(layers=3))
    shown = json.loads(run("models", "show", str(folder), "--json").stdout)
    assert shown["num_hidden_layers"] == 3
    assert shown["config"]["model_type"] == "qwen2_moe"
    assert f"{shown['parameters']:,}" in run("models", "show", str(folder)).stdout


def test_an_unknown_model_names_the_nearest() -> None:
    result = run("models", "show", "qwen2.5-7b-instrct")
    assert result.returncode == 2
    assert "Did you mean 'qwen2.5-7b-instruct'?" in result.stderr


def test_flags_take_short_and_megatron_names_alike() -> None:
    short = run("flags", "qwen2.5-7b", "--tp", "2", "--pp", "2", "--gpus", "8")
    long_names = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    assert short.returncode == 0, short.stderr
    assert run("flags", "qwen2.5-7b", *long_names, "--gpus", "8").stdout == short.stdout
    assert "--sequence-parallel" in short.stdout


def test_flags_of_a_folder_name_its_tokenizer(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "model", tiny_moe())
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    result = run("flags", str(folder), "--format", "json", "--ep", "2", "--seq-length", "64")
    assert result.returncode == 0, result.stderr
    groups = json.loads(result.stdout)["groups"]
    assert groups["GPT_MODEL_ARGS"][-2:] == ["--tokenizer-model", str(folder)]
    assert "--moe-shared-expert-gate" in groups["MOE_ARGS"]


def test_flags_as_arguments_keep_stdout_clean() -> None:
    result = run("flags", "qwen2.5-0.5b", "--format", "args")
    assert result.stdout.startswith("--spec megatron_qwen.model.spec get_qwen_layer_spec --num-layers 24 ")
    assert result.stdout.count("\n") == 1
    assert "note: No tokenizer is named" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tp", "3"), "tp=3"),
        (("--format", "xml"), "--format: got 'xml', expected bash, json or args"),
        (("--pp-layout", "7,x"), "--pp-layout: got '7,x'"),
        (("--dtype", "fp8"), "dtype: got 'fp8'"),
    ],
)
def test_bad_options_end_with_code_2_and_the_value(arguments: tuple[str, ...], words: str) -> None:
    result = run("flags", "qwen2.5-7b", *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stdout == ""
