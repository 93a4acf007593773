"""Passkey retrieval: a number hidden in filler text, asked for at the end (Mohtashami and Jaggi, arXiv 2305.16300).

The prompts are made to a length in tokens and a depth: the place of the number, 0 at the start of the filler, 1 at its
end. A model with a chat template is asked in a user's message; any other gets the beginning of the answer to complete.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.data.tokenizer import QwenTokenizer
    from megatron_qwen.inference.engine import Engine

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
HIDDEN = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key?"
ANSWER = " The pass key is"
ANSWER_TOKENS = 24
KEY_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class PasskeyCase:
    """One question.

    Attributes:
        length: tokens asked for.
        depth: in [0, 1].
        trial: number of the repetition.
        key: the digits to find.
        prompt: text, with the chat template's tokens if any.
        prompt_tokens: its length; at most `length`, by less than a line of filler.
    """

    length: int
    depth: float
    trial: int
    key: str
    prompt: str
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class PasskeyAnswer:
    """What a model said.

    Attributes:
        case: the question.
        answer: its text.
        is_correct: the first number in it is the key.
        seconds: for prefill and answer.
    """

    case: PasskeyCase
    answer: str
    is_correct: bool
    seconds: float


def make_case(
    tokenizer: QwenTokenizer, *, length: int, depth: float, trial: int = 0, seed: int = 0, chat: bool = False
) -> PasskeyCase:
    """Write one question; the key depends on the seed, length, depth and trial alone.

    Args:
        tokenizer: of the model.
        length: tokens of the prompt, the chat template's included, at most.
        depth: where the key is hidden.
        trial: number of the repetition.
        seed: of the keys.
        chat: ask in a user's message.

    Raises:
        ConfigError: a depth outside [0, 1], or a length that does not hold the question.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"passkey: depth {depth}: expected a number from 0 (start) to 1 (end)")
    drawn = random.Random(f"{seed} {length} {depth} {trial}")  # noqa: S311 not for secrets
    key = str(drawn.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))

    def write(lines: int) -> tuple[str, int]:
        before = round(lines * depth)
        text = TASK + FILLER * before + HIDDEN.format(key=key) + FILLER * (lines - before) + QUESTION
        prompt = tokenizer.apply_chat([{"role": "user", "content": text}]) if chat else text + ANSWER
        return prompt, len(tokenizer.encode(prompt))

    without, per_line = write(0)[1], len(tokenizer.encode(FILLER))
    if without > length:
        raise ConfigError(f"passkey: length {length}: the question alone has {without} tokens")
    lines = (length - without) // per_line
    prompt, tokens = write(lines)
    while tokens > length:  # where a tokenizer joins what the parts have apart
        lines -= -(-(tokens - length) // per_line)
        prompt, tokens = write(lines)
    return PasskeyCase(length=length, depth=depth, trial=trial, key=key, prompt=prompt, prompt_tokens=tokens)


def run_passkey(
    engine: Engine, cases: Sequence[PasskeyCase], *, on_answer: Callable[[PasskeyAnswer], None] | None = None
) -> list[PasskeyAnswer]:
    """Ask every question by itself, greedily. Collective, as `Engine.generate`.

    Args:
        engine: the model.
        cases: see `make_case`.
        on_answer: called after each.

    Raises:
        ConfigError: a prompt that the model cannot take.
    """
    from megatron_qwen.data.control_tokens import END_OF_DOCUMENT, END_OF_TURN
    from megatron_qwen.inference.sampling import SamplingParams

    ends = tuple(each for text in (END_OF_DOCUMENT, END_OF_TURN) for each in engine.tokenizer.encode(text))
    params = SamplingParams(greedy=True, max_new_tokens=ANSWER_TOKENS, stop_token_ids=ends)
    answers = []
    for case in cases:
        start = time.perf_counter()
        (completion,) = engine.generate([case.prompt], params)
        found = re.search(r"\d+", completion.text)
        answers.append(
            PasskeyAnswer(
                case=case,
                answer=completion.text,
                is_correct=found is not None and found.group() == case.key,
                seconds=time.perf_counter() - start,
            )
        )
        if on_answer:
            on_answer(answers[-1])
    return answers


def accuracy_table(answers: Sequence[PasskeyAnswer]) -> dict[int, dict[float, float]]:
    """Return the share of correct answers by length and depth, both ascending."""
    table: dict[int, dict[float, float]] = {}
    for length in sorted({each.case.length for each in answers}):
        of_length = [each for each in answers if each.case.length == length]
        table[length] = {}
        for depth in sorted({each.case.depth for each in of_length}):
            here = [each.is_correct for each in of_length if each.case.depth == depth]
            table[length][depth] = sum(here) / len(here)
    return table
