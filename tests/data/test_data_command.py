from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_qwen.cli import data as verbs
from megatron_qwen.errors import CorruptInputError

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def run():
    app = typer.Typer(pretty_exceptions_enable=False)
    verbs.register(app)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def corpus(tmp_path, library_texts) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(library_texts):
        (folder / f"{number}.py").write_text(text)
    return folder


def test_from_text_to_checked_data_set(run, corpus, tmp_path, library_texts):
    trained = json.loads(run("tokenizer", corpus, "--vocab-size", 500, "--out", tmp_path / "t", "--json"))
    assert trained["vocab_size"] == 500
    assert trained["documents"] == len(library_texts)
    prepared = json.loads(
        run("prepare", corpus, "--tokenizer", tmp_path / "t", "--out", tmp_path / "d" / "set", "--workers", 2, "--json")
    )
    assert prepared["documents"] == len(library_texts)
    seen = json.loads(run("inspect", tmp_path / "d" / "set", "--tokenizer", tmp_path / "t", "--json"))
    assert seen["tokens"] == prepared["tokens"]
    assert seen["documents_ending_in_eod"] == seen["documents"] == len(library_texts)
    assert library_texts[0].startswith(seen["sample"])
    assert 0 < seen["unigram_entropy"] < 7
    assert seen["length"]["min"] <= seen["length"]["median"] <= seen["length"]["max"]


def test_tables_show_counts_and_skipped_records(run, corpus, tmp_path):
    (corpus / "bad.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    table = run("tokenizer", corpus, "--vocab-size", 300, "--out", tmp_path / "t", "--skip-bad")
    assert "300" in table
    table = run(
        "prepare", corpus, "--tokenizer", tmp_path / "t", "--out", tmp_path / "set", "--workers", 1, "--skip-bad"
    )
    assert "bad records skipped" in table
    assert "line 2: field" in table.replace("\n", " ")
    assert "nats per token" in run("inspect", tmp_path / "set")
    with pytest.raises(CorruptInputError, match="line 2"):
        run("tokenizer", corpus, "--vocab-size", 300, "--out", tmp_path / "t2")


def test_bench_reports_both_sides(run, corpus, tmp_path):
    run("tokenizer", corpus, "--vocab-size", 300, "--out", tmp_path / "t")
    report = json.loads(run("bench", corpus, "--tokenizer", tmp_path / "t", "--workers", 1, "--repeats", 1, "--json"))
    assert report["ratio"] == report["bare_seconds"][0] / report["prepare_seconds"][0]


def test_registering_the_verbs_and_preparing_needs_no_torch(corpus, tmp_path):
    script = """
import sys
from megatron_qwen.cli import data
heavy = {"torch", "megatron", "transformers", "numpy", "tokenizers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from megatron_qwen.data import prepare, summary
assert not {"torch", "megatron", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)
