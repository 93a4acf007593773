from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_qwen.data.blend import build_datasets, parse_split, split_documents, unigram_entropy
from megatron_qwen.data.index_format import read_index
from megatron_qwen.data.indexed import map_tokens
from megatron_qwen.data.prepare import prepare
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.data.writer import DatasetWriter
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError
from megatron_qwen.testing.ranks import run_ranks

SEQ = 16
KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def sample_ids(dataset, count: int | None = None) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset) if count is None else count)]


@pytest.fixture
def build(data_set, tokenizer, tmp_path):
    def build(blend=None, **changes):
        options = {
            "seq_length": SEQ, "seed": 1, "num_samples": (40, 2, 0), "split": "80,20,0",
            "tokenizer": tokenizer, "cache_dir": tmp_path / "cache", **changes,
        }  # fmt: skip
        return build_datasets(blend or [(1.0, data_set)], **options)

    return build


@pytest.fixture(scope="module")
def second_set(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("second")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": f"OTHER {i} " * 9}) for i in range(30)))
    prepare([folder / "a.jsonl"], tokenizer, folder / "set", workers=1)
    return folder / "set"


def test_samples_are_shifted_unmasked_and_not_reset_at_documents(build, tokenizer):
    train, valid, test = build()
    assert test is None
    assert len(train) >= 40
    assert len(valid) >= 2
    saw_separator = False
    for i in range(len(train)):
        sample = train[i]
        assert set(sample) == set(KEYS)
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * SEQ
        assert sample["position_ids"].tolist() == list(range(SEQ))
        saw_separator = saw_separator or tokenizer.eod_id in sample["tokens"].tolist()[:-1]
    assert saw_separator


def test_one_epoch_holds_each_training_token_once_and_no_validation_token(build, data_set):
    index = read_index(data_set)
    train_documents, valid_documents, _ = split_documents(len(index.lengths), "80,20,0")
    num_tokens = int(index.lengths[: train_documents.stop].sum())
    train, _, _ = build(num_samples=((num_tokens - 1) // SEQ, 2, 0))
    tokens = map_tokens(data_set, index)
    stream = np.array(sample_ids(train)).ravel()
    expected = np.bincount(tokens[:num_tokens], minlength=600)
    got = np.bincount(stream, minlength=600)
    assert (got <= expected).all()
    assert num_tokens - len(stream) <= SEQ
    # Training documents are numbered 0 to 15, validation documents 16 to 19; their first words say so.
    assert valid_documents == range(16, 20)


def test_order_depends_on_the_seed_and_on_nothing_else(build, tmp_path):
    first = sample_ids(build()[0])
    assert sample_ids(build()[0]) == first  # from the cache
    assert sample_ids(build(cache_dir=tmp_path / "other")[0]) == first
    shuffled = sample_ids(build(seed=2)[0])
    assert shuffled != first


def test_blend_draws_by_weight_and_says_from_where(build, data_set, second_set, tokenizer):
    train, _, _ = build([(3.0, data_set), (1.0, second_set)], num_samples=(40, 0, 0))
    share = [int(train[i]["dataset_id"]) for i in range(40)]
    assert share.count(0) == 30
    assert share.count(1) == 10
    other = "OTHER"
    for i in range(40):
        assert (other in tokenizer.decode(train[i]["tokens"])) == (share[i] == 1)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_short_runs_on_many_sets_never_draw_past_the_end(build, data_set, second_set, count):
    blend = [(1.0, data_set), (0.01, second_set), (5.0, data_set), (0.2, second_set), (0.3, data_set)]
    train, _, _ = build(blend, num_samples=(count, 0, 0))
    assert len(sample_ids(train)) >= count


def test_many_epochs_go_on_without_end(build):
    assert len(build(num_samples=(2000, 0, 0))[0]) >= 2000


def samples_of_two_blends(good, bad, folder: str) -> tuple[list[list[list[int]]], str]:
    """On a rank: the samples of the good blend, and why the bad one is refused."""
    import torch

    torch.distributed.init_process_group("gloo")
    options = {
        "seq_length": SEQ, "seed": 1, "split": "80,20,0", "num_samples": (40, 2, 0),
        "tokenizer": QwenTokenizer.load(Path(folder) / "tokenizer"), "cache_dir": Path(folder) / "rank-cache",
    }  # fmt: skip
    with pytest.raises(CorruptInputError) as refused:
        build_datasets(bad, **options)
    train, valid, _ = build_datasets(good, **options)
    torch.distributed.destroy_process_group()
    return [sample_ids(train, 40), sample_ids(valid, 2)], str(refused.value)


@pytest.mark.multirank
def test_ranks_see_the_order_that_one_process_sees_and_refuse_together(
    build, data_set, second_set, tokenizer, tmp_path
):
    tokenizer.save(tmp_path / "tokenizer")
    good = [(3.0, str(data_set)), (1.0, str(second_set))]
    for suffix in (".bin", ".idx"):
        (tmp_path / f"bad{suffix}").write_bytes(Path(f"{data_set}{suffix}").read_bytes()[:-1])
    train, valid, _ = build(good)
    alone = [sample_ids(train, 40), sample_ids(valid, 2)]
    results = run_ranks(samples_of_two_blends, 2, good, [(1.0, str(tmp_path / "bad"))], str(tmp_path), timeout=300)
    for samples, refusal in results:
        assert samples == alone
        assert "bad.idx" in refusal


def test_new_data_under_an_old_name_does_not_use_the_old_indices(build, tokenizer, tmp_path):
    prefix = tmp_path / "set"
    rng = np.random.default_rng(0)
    for lengths in ([100, 50, 30], [20, 10, 40, 90]):
        with DatasetWriter(prefix, vocab_size=tokenizer.vocab_size, overwrite=True) as writer:
            writer.add(rng.integers(0, 500, sum(lengths)), np.array(lengths))
            writer.commit({})
        train, _, _ = build([(1.0, prefix)], num_samples=(5, 0, 0), split="1,0,0")
        assert train.document_index.max() == len(lengths) - 1


def test_indices_left_half_written_are_built_again(build, tmp_path):
    before = sample_ids(build()[0])
    (cache,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (cache / "complete.json").unlink()
    for path in cache.glob("*shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:100])
    assert sample_ids(build()[0]) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": [(0.0, "x"), (1.0, "y")]}, "blend weights"),
        ({"blend": [(math.nan, "x")]}, "blend weights"),
        ({"split": "98,2"}, "expected three weights"),
        ({"split": "98;2;0"}, "expected three weights"),
        ({"split": "0,0,0"}, "expected three weights"),
        ({"split": "-1,2,0"}, "expected three weights"),
        ({"seq_length": 0}, "seq_length 0"),
        ({"num_samples": (1, -1, 0)}, "three counts"),
        ({"num_samples": (1, 1, 1)}, "test split holds 0 tokens in 0 of 20 documents"),
        ({"seq_length": 100_000}, "train split holds"),
    ],
)
def test_requests_that_cannot_work_are_refused_before_megatron_sees_them(build, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)
    with pytest.raises(IncompleteInputError, match=r"nothing\.idx"):
        build([(1.0, "nothing")])


@pytest.mark.parametrize("split", ["98,2,0", "1,1,1", "90,5,5", "0.7,0.2,0.1", "969,30,1"])
def test_our_split_is_megatrons(split):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for count in (1, 7, 100, 999, 12345):
        theirs = [range(round(ends[0] * count), round(ends[1] * count)) if ends else None for ends in matrix]
        for ours, part in zip(split_documents(count, split), theirs, strict=True):
            assert not ours if part is None else ours == part
    assert sum(parse_split(split)) == pytest.approx(1)


def test_unigram_entropy_is_that_of_the_counted_frequencies(tmp_path):
    with DatasetWriter(tmp_path / "s", vocab_size=10) as writer:
        writer.add(np.array([1, 1, 2, 2, 3, 3, 4, 4, 9, 9, 9, 9]), np.array([8, 4]))
        writer.commit({})
    assert unigram_entropy(tmp_path / "s", documents=range(1)) == pytest.approx(math.log(4))
    assert unigram_entropy(tmp_path / "s", documents=range(1, 2)) == 0
    assert unigram_entropy(tmp_path / "s") == pytest.approx(4 / 6 * math.log(6) + 1 / 3 * math.log(3))
    with pytest.raises(ConfigError, match="of the 2 in"):
        unigram_entropy(tmp_path / "s", documents=range(3))


def test_building_datasets_leaves_torch_cuda_alone(data_set, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    script = f"""
import torch
before = dict(vars(torch.cuda))
from megatron_qwen.data.blend import build_datasets
from megatron_qwen.data.tokenizer import QwenTokenizer
build_datasets([(1.0, {str(data_set)!r})], seq_length=8, seed=1, num_samples=(4, 0, 0),
               tokenizer=QwenTokenizer.load({str(tmp_path / "tokenizer")!r}), cache_dir={str(tmp_path / "c")!r})[0][0]
import megatron.core.datasets.gpt_dataset as m
assert m.torch is torch
assert all(vars(torch.cuda)[k] is v for k, v in before.items() if not k.startswith("_"))
"""
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120, cwd=root)
