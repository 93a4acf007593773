from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import PROMPTS, write_folder

from megatron_qwen import ops
from megatron_qwen.conversion import import_hf
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.inference.engine import Engine
from megatron_qwen.inference.sampling import SamplingParams
from megatron_qwen.inference.sparse_prefill import SparseRequest
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), style="chat")


@pytest.fixture(scope="module")
def rank_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as `folder`, one pickle per rank of another layout than any that loads it."""
    target = tmp_path_factory.mktemp("ranks") / "ranks"
    import_hf(folder, target, progress=False, ckpt_format="torch", layout=ParallelLayout(pp=2))
    return target


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "megatron_qwen", "generate", *arguments],
        input=stdin, capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip


def test_json_tells_what_was_written_and_where_each_setting_came_from(folder: Path) -> None:
    result = run(str(folder), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-new-tokens", "9", "--json",
                 "--top-k", "5")  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [each["prompt"] for each in answer["completions"]] == PROMPTS[:2]
    for each in answer["completions"]:
        assert len(each["token_ids"]) == len(each["logprobs"]) <= 9
    tokenizer = QwenTokenizer.load(folder)
    ends = sorted([tokenizer.eos_id, tokenizer.eod_id])
    assert answer["sampling"]["stop_token_ids"] == {"value": ends, "from": "generation_config.json"}
    assert answer["sampling"]["temperature"] == {"value": 0.7, "from": "generation_config.json"}
    assert answer["sampling"]["top_k"] == {"value": 5, "from": "option"}
    assert answer["sampling"]["greedy"] == {"value": False, "from": "option"}
    assert answer["sampling"]["seed"] == {"value": 0, "from": "default"}


def test_a_prompt_beyond_the_positions_needs_chunks_and_says_so(folder: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "long.txt"
    prompt.write_text("def f(x):\n" * 100)
    options = (str(folder), "--prompt-file", str(prompt), "--max-new-tokens", "5", "--greedy", "--json")
    refused = run(*options)
    assert refused.returncode == 2
    assert "--dca-chunk-size 192 --dca-local-size 12" in refused.stderr
    budgets = tmp_path / "budgets.json"
    ops.SparseAttentionConfig(((ops.HeadBudget(31, 50),) * 4,) * 4).write(budgets)
    result = run(*options, "--dca-chunk-size", "192", "--dca-local-size", "12", "--prefill-chunk-size", "133",
                 "--cache-tokens", "1020", "--sparse-attention-config", str(budgets),
                 "--sparse-attention-threshold", "300")  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["dual_chunk_attention"] == {"chunk_size": 192, "local_size": 12, "original_length": 256}
    assert answer["sparse_prefill"] == {"threshold": 300, "last_q": 64}
    (completion,) = answer["completions"]
    assert completion["prompt_tokens"] > 300
    sparse = SparseRequest(config_file=budgets, threshold=300)
    engine = Engine.load(folder, chunk_size=192, local_size=12, prefill_chunk_size=133, sparse=sparse)
    used = {name: answer["sampling"][name]["value"] for name in ("repetition_penalty", "stop_token_ids")}
    params = SamplingParams(greedy=True, max_new_tokens=5, **used)
    (expected,) = engine.generate([prompt.read_text()], params)
    assert list(expected.token_ids) == completion["token_ids"]
    assert expected.logprobs == pytest.approx(completion["logprobs"], abs=1e-4)
    groups.shutdown()


@pytest.mark.multirank
def test_two_ranks_read_stdin_and_one_of_them_prints_the_same_from_rank_files(folder: Path, rank_files: Path) -> None:
    options = ("--max-new-tokens", "12", "--greedy", "--dtype", "fp32")
    one = run(str(folder), *options, stdin=PROMPTS[2])
    two = run(str(rank_files), *options, "--tp", "2", "--allow-pickle", stdin=PROMPTS[2])
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert one.stdout == two.stdout != ""
    streamed = run(str(folder), *options, "--stream", stdin=PROMPTS[2])
    assert streamed.stdout == one.stdout


def test_chat_wraps_the_prompt_in_the_template(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Hello"\n\n{"prompt": "Bye"}\n')
    result = run(str(folder), "--prompt-file", str(prompts), "--chat", "--system", "Be brief.", "--json",
                 "--max-new-tokens", "2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert [each["prompt"] for each in answer["completions"]] == [
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        for text in ("Hello", "Bye")
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "--prompt", "x"], 3, "nowhere: no such folder"),
        (["{model}"], 2, "no prompt"),
        (["{model}", "--prompt", ""], 2, "prompt 0 is empty"),
        (["{model}", "--prompt", "x" * 300], 2, "300 tokens; the model has 256 positions"),
        (["{model}", "--prompt-file", "nofile"], 3, "nofile: no such file"),
        (["{model}", "--prompt", "x", "--top-p", "1.2"], 2, "top_p: got 1.2"),
        (["{model}", "--prompt", "x", "--dtype", "int4"], 2, "--dtype: got 'int4'"),
        (["{model}", "--prompt", "x", "--system", "y"], 2, "add --chat"),
        (["{model}", "--prompt", "x", "--stream", "--json"], 2, "exclude each other"),
        (["{no tokenizer}", "--prompt", "x"], 3, "no tokenizer.json"),
        (["{ranks}", "--prompt", "x"], 3, "--allow-pickle"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    folder: Path, rank_files: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    bare = write_folder(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    places = {"{model}": str(folder), "{no tokenizer}": str(bare), "{ranks}": str(rank_files)}
    result = run(*[places.get(each, each) for each in arguments])
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
