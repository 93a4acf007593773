from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.cli.app import build_app
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import QwenError
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf

SOURCE = Path(__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = write_tiny_hf(tmp_path_factory.mktemp("model"), tiny_dense(), seed=5)
    QwenTokenizer.train([SOURCE.read_text()] * 3, 300).save(target, style="chat")
    return target


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE.parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "megatron_qwen", "eval", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.multirank
def test_passkey_on_two_ranks_writes_table_json_and_map(folder: Path, tmp_path: Path) -> None:
    result = run("passkey", folder, "--lengths", "400,300", "--depths", "0,0.5,1", "--trials", "2", "--out",
                 tmp_path / "new" / "out", "--dca-chunk-size", "128", "--tp", "2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "400 tokens" in result.stdout
    assert "12/12" in result.stderr
    record = json.loads((tmp_path / "new" / "out" / "passkey.json").read_text())
    assert list(record["found"]) == ["300", "400"]
    assert list(record["found"]["300"]) == ["0.0", "0.5", "1.0"]
    assert record["chat"] is True
    assert record["dual_chunk_attention"] == {"chunk_size": 128, "local_size": 8, "original_length": 256}
    assert len(record["answers"]) == 12
    assert all(set(each) >= {"key", "answer", "is_correct", "seconds", "prompt_tokens"} for each in record["answers"])
    assert (tmp_path / "new" / "out" / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_perplexity_against_plain_attention(folder: Path, tmp_path: Path) -> None:
    result = run("perplexity", folder, "--text", SOURCE, "--lengths", "100,200", "--window", "64", "--samples", "2",
                 "--dca-chunk-size", "128", "--dca-local-size", "64", "--against-full", "--json", "--out", tmp_path,
                 "--prefill-chunk-size", "48")  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "perplexity.json").read_text())
    chunked, plain = (record["attention"][f"{name} attention"] for name in ("dual chunk", "plain"))
    assert [(each["start"], each["end"]) for each in chunked["windows"]] == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert chunked["windows"][0]["loss"] == pytest.approx(plain["windows"][0]["loss"], abs=1e-5)
    assert chunked["windows"][2]["loss"] != pytest.approx(plain["windows"][2]["loss"], abs=1e-4)
    assert [each["tokens"] for each in chunked["lengths"]] == [198, 398]
    assert (tmp_path / "perplexity.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("passkey", "MODEL", "--lengths", "300"), 2, "the model has 256 positions"),
        (("passkey", "MODEL", "--lengths", "300", "--dca-chunk-size", "0"), 2, "the model has 256 positions"),
        (("passkey", "MODEL/..", "--lengths", "300"), 3, "neither config.json nor hf"),
        (("perplexity", "MODEL", "--text", "MODEL"), 3, "Is a directory; expected a text file"),
        (("passkey", "MODEL", "--depths", "0;1"), 2, "--depths: got '0;1', expected numbers separated by commas"),
        (("perplexity", "MODEL", "--text", "MODEL/no.txt"), 3, "no such file"),
        (("perplexity", "MODEL", "--text", "MODEL/config.json", "--lengths", "9999"), 2, "Give a longer text"),
        (("passkey", "MODEL", "--out", "/dev/null/here"), 4, "cannot create /dev/null/here"),
        (("perplexity", "/none", "--text", "x"), 3, "/none: no such folder"),
        (("passkey", "MODEL", "--trials", "0"), 2, "--trials: got 0"),
        (("passkey", "MODEL", "--dtype", "fp8"), 2, "--dtype: got 'fp8'"),
        (("passkey", "MODEL", "--dca-local-size", "8"), 2, "local_size is 8 without chunk_size"),
        (("perplexity", "MODEL", "--text", "MODEL/config.json", "--window", "1"), 2, "--window: got 1"),
        (
            ("perplexity", "MODEL", "--text", "MODEL/config.json", "--lengths", "90", "--against-full"),
            2,
            "plain without",
        ),
    ],
)
def test_requests_that_cannot_be_met(folder: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    words = [each.replace("MODEL", str(folder)) for each in arguments]
    with pytest.raises(QwenError, match=message) as caught:
        build_app()(["eval", *words], standalone_mode=False)
    assert caught.value.exit_code == code
