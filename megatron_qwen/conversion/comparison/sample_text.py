"""The tokens on which two models are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.data.tokenizer import QwenTokenizer

# Prose, figures, code and another script: none of them leaves a part of the model idle.
_TEXT = """The river froze in the second week of December, and by the 21st it carried 14 carts a day. Nobody had
planned for that. Bread cost 3.75 in the morning and 4.20 at dusk; a pair of boots, when there was one, went for more
than a month's pay. What did people do? They walked, traded, argued, and wrote everything down.

def total(prices: dict[str, float], basket: list[str]) -> float:
    return sum(prices[item] for item in basket if item in prices)

冬天来得很早。河面结了冰。人们在冰上来来往往。The ledger survives: 312 pages, two hands, one blot of ink.
"""


def sample_tokens(a: WeightSource, b: WeightSource, *, tokens: int, seed: int) -> tuple[Tensor, bool]:
    """Return ids [tokens] (int64) below both vocabularies, and whether they are text.

    The text is tokenised by the tokenizer found with A, else with B, and begins at a place that depends on the seed.
    Without a tokenizer, or with one that is larger than a model's vocabulary, the ids are random.
    """
    vocabulary = min(source.config.vocab_size for source in (a, b))
    generator = torch.Generator().manual_seed(seed)
    for source in (a, b):
        for folder in (source.path, source.path / "hf", source.path.parent / "hf"):
            if not (folder / "tokenizer.json").is_file():
                continue
            ids = QwenTokenizer.load(folder).encode(_TEXT)
            if max(ids) < vocabulary:
                start = int(torch.randint(0, len(ids), (1,), generator=generator)) if seed else 0
                return torch.tensor([ids[(start + i) % len(ids)] for i in range(tokens)]), True
    return torch.randint(0, vocabulary, (tokens,), generator=generator), False
