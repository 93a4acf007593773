from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers_referee import ask_transformers

from megatron_qwen.errors import ConfigError
from megatron_qwen.inference.sampling import (
    Sampler,
    SamplingParams,
    draw,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    read_generation_config,
)

ROWS, VOCAB = 3, 101


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1)) * 4


def test_every_filter_equals_the_processor_of_transformers(logits: torch.Tensor) -> None:
    ids = torch.randint(0, VOCAB, (ROWS, 17), generator=torch.Generator().manual_seed(2))
    cases = (
        [("TopKLogitsWarper", {"top_k": k}) for k in (1, 7, 100, 101, 500)]
        + [("TopPLogitsWarper", {"top_p": p}) for p in (0.01, 0.3, 0.8, 0.999)]
        + [("RepetitionPenaltyLogitsProcessor", {"penalty": p}) for p in (1.05, 0.5, 3.0)]
    )
    expected = ask_transformers(
        [{"processor": name, "arguments": args, "ids": ids, "logits": logits} for name, args in cases]
    )
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    ours = {
        "TopKLogitsWarper": lambda top_k: keep_top_k(logits, top_k),
        "TopPLogitsWarper": lambda top_p: keep_top_p(logits, top_p),
        "RepetitionPenaltyLogitsProcessor": lambda penalty: penalize_repetition(logits, seen, penalty),
    }
    for (name, args), answer in zip(cases, expected, strict=True):
        assert torch.equal(ours[name](**args), answer), (name, args)


def test_top_k_keeps_ties_and_top_p_always_keeps_one() -> None:
    assert keep_top_k(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), 1).isfinite().tolist() == [[False, True, True, False]]
    assert keep_top_p(torch.tensor([[1.0, 3.0, 2.0]]), 1e-9).isfinite().tolist() == [[False, True, False]]


def test_draw_inverts_the_cumulative_distribution_and_never_takes_an_impossible_token() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    almost_one = 1 - 2.0**-53
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (almost_one, 4)):
        drawn = draw(probabilities, torch.tensor([uniform], dtype=torch.float64))
        assert drawn.tolist() == [token], uniform


def test_draw_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    count = 20_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    frequencies = torch.bincount(draw(probabilities.expand(count, 4), uniforms), minlength=4) / count
    assert (frequencies - probabilities).abs().max() < 0.015


def sample(params: SamplingParams, prompts: list[list[int]], logits: torch.Tensor, steps: int = 12) -> list[list[int]]:
    sampler = Sampler(params, prompts, VOCAB)
    return torch.stack([sampler(logits)[0] for _ in range(steps)], dim=1).tolist()


def test_a_row_draws_the_same_alone_and_in_any_batch(logits: torch.Tensor) -> None:
    params = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=7)
    prompts = [[1, 2], [3], [4, 5, 6]]
    together = sample(params, prompts, logits)
    for row, prompt in enumerate(prompts):
        assert sample(params, [prompt], logits[row : row + 1]) == [together[row]]
    assert sample(params, prompts[::-1], logits.flip(0)) == together[::-1]
    assert sample(dataclasses.replace(params, seed=8), prompts, logits) != together


def test_the_same_prompt_twice_gets_two_different_completions(logits: torch.Tensor) -> None:
    same = logits[:1].expand(2, -1)
    first, second = sample(SamplingParams(seed=1), [[5], [5]], same)
    assert first != second
    assert sample(SamplingParams(seed=1), [[5]], same[:1]) == [first]


def test_greedy_takes_the_largest_penalised_logit_and_reports_unmodified_log_probabilities() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.9]])
    sampler = Sampler(SamplingParams(greedy=True, repetition_penalty=1.5, temperature=0.1), [[1]], 3)
    (token,), (logprob,) = sampler(logits)
    assert token == 2
    assert logprob == pytest.approx(logits.log_softmax(-1)[0, 2].item())
    # Token 2 counts as seen now; 1.9/1.5 and 2/1.5 leave token 1 ahead.
    assert sampler(logits)[0].tolist() == [1]


def test_temperature_zero_is_greedy(logits: torch.Tensor) -> None:
    expected = logits.argmax(-1)
    assert torch.equal(Sampler(SamplingParams(temperature=0), [[0]] * ROWS, VOCAB)(logits)[0], expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1), ("stop", ("",))],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_generation_config_gives_sampling_and_every_end_token() -> None:
    content = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
               "eos_token_id": [151645, 151643], "pad_token_id": 151643}  # fmt: skip
    assert SamplingParams(**read_generation_config(content)) == SamplingParams(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, stop_token_ids=(151645, 151643)
    )
    assert read_generation_config({"eos_token_id": 3}) == {"greedy": True, "stop_token_ids": (3,)}


@pytest.mark.parametrize("content", [{"temperature": "hot"}, {"eos_token_id": "x"}, {"top_k": True}])
def test_generation_config_of_the_wrong_kind_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_generation_config(content)
