"""One small corpus and its tokenizer for all training tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_qwen.data.prepare import prepare
from megatron_qwen.data.tokenizer import QwenTokenizer

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]

# A letter that no word has, in one document only: one token that some batches hold and most do not.
RARE = "q"


class Corpus(NamedTuple):
    """Where the data and its tokenizer are, as text for recipes."""

    prefix: str
    tokenizer: str


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(20, 90))) for _ in range(60)]
    texts[30] += f" {RARE} " + texts[0]
    (folder / "text").mkdir()
    for index, text in enumerate(texts):
        (folder / "text" / f"{index}.txt").write_text(text)
    tokenizer = QwenTokenizer.train(texts, 320)
    tokenizer.save(folder / "tokenizer")
    prepare([folder / "text"], tokenizer, folder / "data" / "words", workers=1)
    return Corpus(str(folder / "data" / "words"), str(folder / "tokenizer"))


@pytest.fixture
def run_folder(tmp_path: Path) -> str:
    return str(tmp_path / "run")
