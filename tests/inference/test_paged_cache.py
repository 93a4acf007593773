from __future__ import annotations

import random

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.inference import cache as cache_module
from megatron_qwen.inference.cache import CacheShape, PagedCache, gather


def make_cache(num_pages: int, page_size: int, layers: int = 2) -> PagedCache:
    shape = CacheShape(num_layers=layers, num_heads=2, head_dim=4, dtype=torch.float32, page_size=page_size)
    return PagedCache(shape, num_pages, torch.device("cpu"))


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_belong_to_one_sequence_and_come_back(page_size: int) -> None:
    draw = random.Random(page_size)
    cache = make_cache(20, page_size)
    lengths: dict[int, int] = {}
    waited = 0
    for sequence in range(300):
        length = draw.randint(1, 8 * page_size)
        while not cache.can_admit(length):
            waited += 1
            gone = draw.choice(list(lengths))
            cache.release(gone)
            del lengths[gone]
        cache.admit(sequence, length)
        lengths[sequence] = length
        held = [page for each in lengths for page in cache.pages(each)]
        assert len(held) == len(set(held)) == sum(-(-each // page_size) for each in lengths.values())
        assert cache.num_free == 20 - len(held)
    assert waited > 50


def test_what_was_written_is_gathered_from_wherever_its_pages_are() -> None:
    cache = make_cache(9, 3)
    for sequence, length in enumerate((4, 7, 5)):
        cache.admit(sequence, length)
    cache.release(1)
    cache.admit(3, 13)  # the three pages in the middle and two behind
    assert cache.pages(3) == [2, 3, 4, 7, 8]
    texts = {sequence: torch.randn(length, 2, 4) for sequence, length in ((0, 4), (2, 5), (3, 13))}
    for sequence, text in texts.items():
        cache.keys[1].flatten(0, 1)[cache.slots(sequence, 0, len(text))] = text
    order = [3, 0, 2]
    together = gather(cache.keys[1], [cache.pages(each) for each in order], [len(texts[each]) for each in order])
    assert torch.equal(together, torch.cat([texts[each] for each in order]))
    assert torch.equal(gather(cache.keys[1], [cache.pages(3)], [8]), texts[3][:8])
    neighbours = gather(cache.keys[1], [cache.pages(2)], [4])
    assert torch.equal(neighbours, texts[2][:4])
    assert neighbours.untyped_storage().data_ptr() == cache.keys[1].untyped_storage().data_ptr()


def test_a_sequence_that_never_fits_is_told_apart_from_one_that_has_to_wait() -> None:
    cache = make_cache(4, 16)
    cache.admit(0, 33)
    assert not cache.can_admit(17)
    with pytest.raises(ConfigError, match="2 pages, 1 of 4 are free; wait"):
        cache.admit(1, 17)
    with pytest.raises(ConfigError, match=r"65 tokens needs 5 pages of 16 tokens, 0\.01 MiB .* has 4, 0\.01"):
        cache.can_admit(65)


def test_memory_that_is_not_there_is_named_before_it_is_touched() -> None:
    shape = CacheShape(num_layers=28, num_heads=4, head_dim=128, dtype=torch.bfloat16)
    assert shape.page_bytes == 28 * 64 * 4 * 128 * 2 * 2
    with pytest.raises(
        ConfigError, match=r"10,000,000 pages of 64 tokens need 34,\d+\.\d\d GiB .* are free\. .*--cache-tok"
    ):
        PagedCache(shape, 10_000_000, torch.device("cpu"))
    with pytest.raises(ConfigError, match="got 0, expected at least 1"):
        CacheShape(num_layers=1, num_heads=1, head_dim=2, dtype=torch.float32, page_size=0)


def test_memory_that_torch_keeps_on_a_gpu_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"mem_get_info": (1000, 9000), "memory_reserved": 7000, "memory_allocated": 3000}
    for name, value in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert cache_module._free_memory(torch.device("cuda")) == 5000
