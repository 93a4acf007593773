from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError
from megatron_qwen.evaluation.passkey import (
    FILLER,
    HIDDEN,
    QUESTION,
    TASK,
    PasskeyAnswer,
    PasskeyCase,
    accuracy_table,
    make_case,
    run_passkey,
)
from megatron_qwen.evaluation.plots import draw_heat_map
from megatron_qwen.inference.completion import Completion


@pytest.fixture(scope="module")
def tokenizer() -> QwenTokenizer:
    texts = [TASK, FILLER, HIDDEN, QUESTION, Path(__file__).read_text()] * 3
    return QwenTokenizer.train(texts, 400)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_the_key_is_where_it_should_be_in_a_prompt_of_the_length(
    tokenizer: QwenTokenizer, depth: float, chat: bool
) -> None:
    per_line = len(tokenizer.encode(FILLER))
    for length in (300, 1001, 4096):
        case = make_case(tokenizer, length=length, depth=depth, chat=chat)
        assert case.prompt_tokens == len(tokenizer.encode(case.prompt))
        assert length - per_line - 2 <= case.prompt_tokens <= length
        before, after = case.prompt.split(HIDDEN.format(key=case.key))
        above, below = before.count(FILLER), after.count(FILLER)
        assert above == round(depth * (above + below))
        assert len(case.key) == 5
        assert case.prompt.startswith("<|im_start|>system") == chat
        assert case.prompt.endswith("<|im_start|>assistant\n" if chat else "The pass key is")


def test_keys_depend_on_seed_and_place_only(tokenizer: QwenTokenizer) -> None:
    def key(**options: Any) -> str:
        return make_case(tokenizer, **{"length": 300, "depth": 0.5, **options}).key

    assert key() == key() == key(chat=True)
    others = [key(seed=1), key(depth=0.25), key(length=400), key(trial=1)]
    assert len({key(), *others}) == 5


@pytest.mark.parametrize(
    ("length", "depth", "message"), [(300, 1.5, "depth 1.5"), (300, -0.1, "depth -0.1"), (20, 0.5, "length 20: the")]
)
def test_questions_that_cannot_be_asked_are_refused(
    tokenizer: QwenTokenizer, length: int, depth: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_case(tokenizer, length=length, depth=depth)


class Reader:
    """An engine that reads the key out of the prompt, and at depth 0.5 says it wrong."""

    def __init__(self, tokenizer: QwenTokenizer) -> None:
        self.tokenizer = tokenizer

    def generate(self, prompts: list[str], params: Any) -> list[Completion]:
        assert params.is_greedy
        (prompt,) = prompts
        found = re.search(r"Remember it\. (\d+) is", prompt)
        assert found is not None
        lines = prompt.count(FILLER)
        is_half = prompt.split("The pass key is")[0].count(FILLER) == round(lines / 2)
        text = f" {found.group(1)[:-1]}, or {found.group(1)}." if is_half else f" The key: {found.group(1)}. 77777"
        return [Completion(text=text, token_ids=(), finish_reason="stop", logprobs=(), prompt_tokens=len(prompt))]


def test_an_answer_is_right_when_its_first_number_is_the_key(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    cases = [make_case(tokenizer, length=n, depth=d, trial=t) for n in (500, 300) for d in (1, 0.5, 0) for t in (0, 1)]
    seen: list[PasskeyAnswer] = []
    engine: Any = Reader(tokenizer)
    answers = run_passkey(engine, cases, on_answer=seen.append)
    assert seen == answers
    table = accuracy_table(answers)
    assert list(table) == [300, 500]
    assert table == {300: {0: 1.0, 0.5: 0.0, 1: 1.0}, 500: {0: 1.0, 0.5: 0.0, 1: 1.0}}
    draw_heat_map(table, tmp_path / "map.png", title="test")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_shares_are_means_over_trials() -> None:
    case = PasskeyCase(length=100, depth=0.5, trial=0, key="12345", prompt="", prompt_tokens=99)
    right = PasskeyAnswer(case=case, answer="12345", is_correct=True, seconds=1.0)
    assert accuracy_table([right, right, dataclasses.replace(right, is_correct=False)]) == {100: {0.5: 2 / 3}}
