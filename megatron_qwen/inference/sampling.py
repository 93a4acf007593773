"""From logits to the next token: Hugging Face's definitions, drawn so that the layout does not matter.

Every function takes and returns logits on whatever device they live on. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_qwen.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are chosen and when they end.

    Attributes:
        max_new_tokens: upper bound of tokens per completion.
        greedy: take the most likely token; temperature, top_k and top_p are then unused.
        temperature: divides the logits; 0 means greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        repetition_penalty: logits of tokens seen in prompt or completion are divided (if positive) or
            multiplied (if negative) by it; 1 changes nothing.
        seed: of the draws. A prompt's completion depends on the seed and on the prompt, not on the batch.
        stop: a completion ends before the first of these strings.
        stop_token_ids: a completion ends with the first of these tokens.
    """

    max_new_tokens: int = 128
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a number >= 0 (0 means greedy)"),
            ("top_k", self.top_k >= 0, "a whole number >= 0 (0 keeps every token)"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a number > 0 (1 changes nothing)"),
            ("seed", 0 <= self.seed < 2**63, "a whole number in [0, 2^63)"),
            ("stop", all(self.stop), "non-empty strings"),
        )
        for name, is_valid, expected in rules:
            if not is_valid:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.greedy or self.temperature == 0


def read_generation_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `SamplingParams` fields that a generation_config.json sets.

    `do_sample` false or absent means greedy, as in transformers. `eos_token_id` may be one id or a list.

    Raises:
        ConfigError: an entry of the wrong kind.
    """
    fields: dict[str, Any] = {"greedy": not content.get("do_sample", False)}
    for name, kind in (("temperature", float), ("top_p", float), ("repetition_penalty", float), ("top_k", int)):
        value = content.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"generation_config.json: {name}: got {value!r}, expected a number")
            fields[name] = kind(value)
    eos = content.get("eos_token_id")
    if eos is not None:
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            raise ConfigError(f"generation_config.json: eos_token_id: got {eos!r}, expected an id or a list of ids")
        fields["stop_token_ids"] = tuple(ids)
    return fields


def penalize_repetition(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits with those of seen tokens divided by `penalty` where positive, multiplied where negative.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the sign-aware form of transformers.

    Args:
        logits_BV: float logits [B, V].
        seen_BV: bool [B, V], the tokens in prompt and completion so far.
        penalty: positive; 1 changes nothing.
    """
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Return logits with all but the k largest of each row (and ties with the k-th) at -inf."""
    smallest_kept_B1 = logits_BV.topk(min(k, logits_BV.size(-1))).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_kept_B1, float("-inf"))


def keep_top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Return logits with those outside the nucleus at -inf: the fewest tokens whose probability reaches p.

    Source: Holtzman et al. 2020, section 3.1.
    """
    ascending_BV, order_BV = logits_BV.sort(descending=False)
    # A token falls out when it and all less likely ones together hold at most 1 - p.
    drop_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop_BV[:, -1] = False
    return logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), float("-inf"))


def draw(probabilities_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Return int64 tokens [B] by inverting each row's cumulative distribution in vocabulary order.

    One number per row decides, so that rounding differences between layouts or devices change a token
    only where the number falls within that rounding of a boundary.

    Args:
        probabilities_BV: float [B, V], each row with a positive sum.
        uniforms_B: float64 in [0, 1).
    """
    cumulative_BV = probabilities_BV.double().cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    # Rounding may bring u * total up to total itself, behind the last token.
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniforms_B[:, None].to(total_B1) * total_B1, below_total_B1)
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]


class Sampler:
    """Chooses the next token of every row, remembering which tokens each row has seen.

    Each row draws from its own generator, seeded with `params.seed` plus the number of identical prompts
    before it: a completion is the same alone and in any batch, and repeated prompts still differ.
    """

    def __init__(self, params: SamplingParams, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self._seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        self._generators: list[torch.Generator] = []
        repeats: Counter[tuple[int, ...]] = Counter()
        for row, prompt in enumerate(prompts):
            self._seen_BV[row, torch.tensor(prompt, dtype=torch.int64)] = True
            self._generators.append(torch.Generator().manual_seed((params.seed + repeats[tuple(prompt)]) % 2**63))
            repeats[tuple(prompt)] += 1

    def __call__(self, logits_BV: torch.Tensor, rows: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next tokens (int64 [B]) and their log-probabilities under the unmodified logits (float32 [B]).

        Args:
            logits_BV: float.
            rows: the row that each of them belongs to; None for all rows in order.
        """
        rows = range(len(self._generators)) if rows is None else rows
        raw_BV = logits_BV.float()
        self._seen_BV = self._seen_BV.to(raw_BV.device)
        tokens_B = self._choose(raw_BV, rows)
        self._seen_BV[torch.tensor(rows, device=raw_BV.device), tokens_B] = True
        logprobs_BV = raw_BV.log_softmax(dim=-1)
        return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]

    def _choose(self, scores_BV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        params = self.params
        if params.repetition_penalty != 1:
            seen_BV = self._seen_BV[torch.tensor(rows, device=scores_BV.device)]
            scores_BV = penalize_repetition(scores_BV, seen_BV, params.repetition_penalty)
        if params.is_greedy:
            return scores_BV.argmax(dim=-1)
        # The order is that of transformers: penalty, temperature, top-k, top-p.
        scores_BV = scores_BV / params.temperature
        if params.top_k:
            scores_BV = keep_top_k(scores_BV, params.top_k)
        if params.top_p < 1:
            scores_BV = keep_top_p(scores_BV, params.top_p)
        generators = [self._generators[row] for row in rows]
        uniforms_B = torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in generators])
        return draw(scores_BV.softmax(dim=-1), uniforms_B.to(scores_BV.device))
