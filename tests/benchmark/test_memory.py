from __future__ import annotations

import dataclasses

import pytest

from megatron_qwen.benchmark.cases.model_folder import find_config
from megatron_qwen.benchmark.memory import demand, require_memory
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.parameters import count_parameters
from megatron_qwen.model.presets import find_preset

GB = 1e9


def test_states_are_counted_to_the_byte() -> None:
    config = find_config("7B", layers=4, seq_length=512)
    parameters = count_parameters(config).total
    assert parameters == 2_022_229_504
    assert demand(config, dtype="fp32", tokens=1).states == 16 * parameters
    assert demand(config, dtype="bf16", tokens=1).states == 18 * parameters
    assert demand(config, dtype="bf16", tokens=1, contestant="transformers-bf16").states == 8 * parameters


def test_estimate_of_a_run_that_was_measured() -> None:
    # 0.5B, 4 layers, 256 tokens, one thread: the process peaked at 3,624 MiB in fp32 and 3,898 MiB in bf16.
    config = find_config("0.5B", layers=4, seq_length=256)
    assert demand(config, dtype="fp32", tokens=256).total == pytest.approx(3624 * 2**20, rel=0.2)
    assert demand(config, dtype="bf16", tokens=256).total == pytest.approx(3898 * 2**20, rel=0.1)


def test_logits_count_only_where_they_are_held() -> None:
    config = find_config("0.5B", layers=4, seq_length=4096)
    held = demand(config, dtype="bf16", tokens=4096, contestant="megatron_qwen-logits")
    fused = demand(config, dtype="bf16", tokens=4096, contestant="megatron_qwen-fused")
    assert held.logits == 4096 * config.vocab_size * 12
    assert fused.logits < held.logits / 4
    assert demand(config, dtype="fp32", tokens=4096).logits == 4096 * config.vocab_size * 16
    theirs = demand(config, dtype="bf16", tokens=4096, contestant="transformers")
    assert theirs.logits - held.logits == config.vocab_size * config.hidden_size * 2


def test_a_run_that_does_not_fit_is_refused_with_those_that_do() -> None:
    config = find_config("7B", layers=4, seq_length=512)

    def check(available: float, *contestants: str) -> None:
        require_memory(
            config, dtype="fp32", tokens=512, contestants=contestants, available=available, device="this machine"
        )

    check(40 * GB, "megatron_qwen")
    with pytest.raises(ConfigError) as caught:
        check(19 * GB, "megatron_qwen")
    message = str(caught.value)
    assert "2,022,229,504 parameters in fp32 need about 3" in message
    assert "this machine has 19.0 GB free" in message
    assert "These fit: --layers 2 --vocab-size 32768; --layers 1 --vocab-size 32768." in message
    with pytest.raises(ConfigError, match=r"megatron_qwen \+ transformers: .* optimizer 64\.7 GB"):
        check(40 * GB, "megatron_qwen", "transformers")
    with pytest.raises(ConfigError, match="Nothing smaller of this model fits"):
        check(1 * GB, "megatron_qwen")


def test_what_is_said_to_fit_does_fit() -> None:
    config = find_config("7B", layers=4, seq_length=512)
    smaller = dataclasses.replace(find_config("7B", layers=2, seq_length=512), vocab_size=32_768)
    assert demand(smaller, dtype="fp32", tokens=512).total < 19 * GB < demand(config, dtype="fp32", tokens=512).total
    assert find_config("7B", layers=2, seq_length=512, vocab_size=32_768) == smaller


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("7B", "qwen2.5-7b"),
        (" 0.5b ", "qwen2.5-0.5b"),
        ("7B-Instruct", "qwen2.5-7b-instruct"),
        ("A2.7B", "qwen1.5-moe-a2.7b"),
        ("57B-A14B", "qwen2-57b-a14b"),
        ("Qwen/Qwen2.5-72B", "qwen2.5-72b"),
    ],
)
def test_models_are_found_by_what_people_type(typed: str, name: str) -> None:
    assert find_preset(typed) is find_preset(name)


@pytest.mark.parametrize(("typed", "meant"), [("8B", "qwen2.5-7b"), ("57B", "qwen2-57b-a14b"), ("1M", "qwen2.5-")])
def test_sizes_that_do_not_exist_are_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"no preset '{typed}'. Did you mean '{meant}"):
        find_preset(typed)


def test_a_vocabulary_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="--vocab-size: got 1, expected at least 2"):
        find_config("tiny", layers=None, seq_length=8, vocab_size=1)
