from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_folder import MODELS, PROMPTS, complete, write_folder
from transformers_referee import ask_transformers

from megatron_qwen.conversion.loading import load_model
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError
from megatron_qwen.inference.engine import Completion, generate
from megatron_qwen.inference.sampling import SamplingParams
from megatron_qwen.model.config import QwenConfig, YarnScaling
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import write_tiny_hf

NEW_TOKENS = 40
GREEDY = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS)
SAMPLED = SamplingParams(
    temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=3, max_new_tokens=NEW_TOKENS
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_folder(root / name, name) for name in MODELS}


@pytest.fixture(autouse=True, scope="module")
def _leave_groups() -> Iterator[None]:
    yield
    groups.shutdown()


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [list(each.token_ids) for each in completions]


def test_greedy_tokens_of_an_unequal_batch_equal_those_of_transformers_one_by_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    yarn = write_folder(tmp_path / "yarn")
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=64)
    write_tiny_hf(yarn, dataclasses.replace(MODELS["untied"], rope_scaling=scaling), seed=6)
    cases: list[tuple[Path, float]] = [(folder, penalty) for folder in folders.values() for penalty in (1.0, 1.2)]
    cases.append((yarn, 1.0))
    requests = []
    for folder, penalty in cases:
        tokenizer = QwenTokenizer.load(folder)
        requests.append({
            "folder": str(folder),
            "prompts": [tokenizer.encode(prompt) for prompt in PROMPTS],
            "max_new_tokens": NEW_TOKENS,
            "options": {"repetition_penalty": penalty, "eos_token_id": 511},
        })  # fmt: skip
    expected = ask_transformers(requests)
    for (folder, penalty), theirs in zip(cases, expected, strict=True):
        params = dataclasses.replace(GREEDY, repetition_penalty=penalty, stop_token_ids=(511,))
        assert tokens(complete(folder, PROMPTS, params)) == theirs, (folder.name, penalty)


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_completion_is_the_same_alone_and_in_a_batch(
    folders: dict[str, Path], model: str, params: SamplingParams
) -> None:
    together = complete(folders[model], PROMPTS, params)
    alone = [complete(folders[model], [prompt], params)[0] for prompt in PROMPTS]
    assert tokens(together) == tokens(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-4)
    assert tokens(complete(folders[model], PROMPTS[::-1], params)) == tokens(together)[::-1]


@pytest.mark.parametrize("model", list(MODELS))
def test_tokens_with_the_cache_equal_those_of_whole_forward_passes(folders: dict[str, Path], model: str) -> None:
    cached = complete(folders[model], PROMPTS, GREEDY)
    network = load_model(folders[model], dtype=torch.float32, backend="local").eval()
    tokenizer = QwenTokenizer.load(folders[model])
    for prompt, completion in zip(PROMPTS, cached, strict=True):
        text = torch.tensor([tokenizer.encode(prompt) + list(completion.token_ids)])
        with torch.no_grad():
            logits = network(text, torch.arange(text.size(1))[None], None)[0]
        before = text.size(1) - NEW_TOKENS - 1
        chosen = logits[before:-1].log_softmax(-1)
        assert chosen.argmax(-1).tolist() == list(completion.token_ids)
        assert chosen.amax(-1).tolist() == pytest.approx(completion.logprobs, abs=2e-4)


LAYOUTS = {
    2: [
        ("untied", ParallelLayout(tp=2)),
        ("untied", ParallelLayout(pp=2)),
        ("untied", ParallelLayout(pp=2, pp_layout=(1, 3))),
        ("untied", ParallelLayout(pp=2, vpp=2)),
        ("tied", ParallelLayout(tp=2)),
        ("tied", ParallelLayout(pp=2, pp_layout=(2, 1))),
        ("moe", ParallelLayout(tp=2)),
    ],
    4: [("untied", ParallelLayout(tp=2, pp=2)), ("moe", ParallelLayout(tp=2, pp=2))],
}


def on_rank(folders: dict[str, Path], cases: list[tuple[str, ParallelLayout]]) -> list[list[list[list[int]]]]:
    torch.set_num_threads(1)
    answers = []
    for model, layout in cases:
        answers.append([tokens(complete(folders[model], PROMPTS, params, layout)) for params in (GREEDY, SAMPLED)])
    return answers


@pytest.mark.multirank
@pytest.mark.parametrize("nproc", [2, 4])
def test_every_rank_of_every_layout_writes_what_one_rank_writes(folders: dict[str, Path], nproc: int) -> None:
    cases = LAYOUTS[nproc]
    alone = {
        model: [tokens(complete(folders[model], PROMPTS, params)) for params in (GREEDY, SAMPLED)] for model in MODELS
    }
    for answers in run_ranks(on_rank, nproc, folders, cases):
        for (model, layout), answer in zip(cases, answers, strict=True):
            assert answer == alone[model], (model, layout)


def test_a_stop_token_ends_its_row_and_no_other(folders: dict[str, Path]) -> None:
    free = complete(folders["untied"], PROMPTS, GREEDY)
    end = free[0].token_ids[7]
    stopped = complete(folders["untied"], PROMPTS, dataclasses.replace(GREEDY, stop_token_ids=(9999, end)))
    first = free[0].token_ids.index(end)
    assert stopped[0].token_ids == free[0].token_ids[: first + 1]
    assert stopped[0].finish_reason == "stop"
    for row in range(1, len(PROMPTS)):
        whole, cut = free[row].token_ids, stopped[row].token_ids
        assert cut == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert {each.finish_reason for each in free} == {"length"}


def test_a_stop_string_is_cut_off_wherever_the_tokens_split_it(folders: dict[str, Path]) -> None:
    (free,) = complete(folders["untied"], PROMPTS[:1], GREEDY)
    stop = free.text[4:9]
    (stopped,) = complete(folders["untied"], PROMPTS[:1], dataclasses.replace(GREEDY, stop=("not in there", stop)))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < NEW_TOKENS


def test_streamed_text_is_the_completion_in_pieces(folders: dict[str, Path]) -> None:
    groups.initialize(ParallelLayout())
    network = load_model(folders["untied"], dtype=torch.float32, backend="local")
    tokenizer = QwenTokenizer.load(folders["untied"])
    pieces: dict[int, list[str]] = {0: [], 1: []}
    params = dataclasses.replace(GREEDY, stop=("e",))
    completions = generate(
        network, tokenizer, PROMPTS[:2], params, on_text=lambda index, text: pieces[index].append(text)
    )
    assert ["".join(pieces[row]) for row in pieces] == [each.text for each in completions]
    (whole,) = generate(network, tokenizer, PROMPTS[:1], GREEDY, on_text=lambda _index, text: pieces[0].append(text))
    assert "".join(pieces[0]) == completions[0].text + whole.text
    assert len(pieces[0]) > 5


def test_a_model_in_training_goes_back_to_training(folders: dict[str, Path]) -> None:
    groups.initialize(ParallelLayout())
    network = load_model(folders["untied"], dtype=torch.float32, backend="local").train()
    generate(network, QwenTokenizer.load(folders["untied"]), ["x"], SamplingParams(max_new_tokens=1))
    assert network.training
    text = torch.arange(6)[None]
    network(text, text, None).sum().backward()


def test_completions_end_at_the_last_position(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    positions = MODELS["untied"].max_position_embeddings
    prompt = "x" * (positions - 3)
    (completion,) = complete(folders["untied"], [prompt], GREEDY)
    assert completion.prompt_tokens + len(completion.token_ids) == positions
    assert completion.finish_reason == "length"
    assert "last position" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "no prompt"), (["a", ""], "prompt 1 is empty"), (["x" * 5000], "5,000 tokens; the model has 256 positions")],
)
def test_prompts_that_cannot_be_completed_are_refused(
    folders: dict[str, Path], prompts: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(folders["untied"], prompts, GREEDY)


def test_a_tokenizer_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    small = write_folder(tmp_path / "small")
    config: QwenConfig = dataclasses.replace(MODELS["untied"], vocab_size=70)
    write_tiny_hf(small, config)
    with pytest.raises(ConfigError, match="tokenizer belongs to another model"):
        complete(small, PROMPTS, GREEDY)
