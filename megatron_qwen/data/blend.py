"""Training samples from one data set or a weighted blend of several, through Megatron's own datasets.

The order of samples is a function of the data sets, weights, split, seed, sequence length and the number of samples
asked for. It knows nothing of ranks or layouts: sample i is the same everywhere, and a resumed run that asks for
the same numbers of samples goes on where it stopped.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from filelock import FileLock

from megatron_qwen.checkpoint.atomic import atomic_write_text, storage_errors
from megatron_qwen.data.index_format import bin_path, idx_path
from megatron_qwen.data.indexed import check_indexed
from megatron_qwen.data.summary import SPLITS, parse_split, split_documents, unigram_entropy
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError, QwenError

if TYPE_CHECKING:
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"

__all__ = ["MegatronTokenizerView", "build_datasets", "parse_split", "split_documents", "unigram_entropy"]

_T = TypeVar("_T")


class MegatronTokenizerView:
    """What Megatron's datasets ask of a tokenizer, on both supported versions.

    There is no `pad`: Megatron then marks padding with -1 in its samples and masks its loss. With a `pad` equal to
    `eod` it would warn and do the same.
    """

    def __init__(self, tokenizer: QwenTokenizer) -> None:
        """Take separator, size and identity from `tokenizer`."""
        self.eod = tokenizer.eod_id
        self.eos = tokenizer.eod_id
        self.vocab_size = tokenizer.vocab_size
        # Names the cached indices: by content, so that a moved tokenizer folder does not rebuild them.
        self.unique_identifiers = OrderedDict(fingerprint=tokenizer.fingerprint())


def build_datasets(
    blend: Sequence[tuple[float, str | Path]],
    *,
    seq_length: int,
    seed: int,
    split: str = "98,2,0",
    num_samples: tuple[int, int, int],
    tokenizer: QwenTokenizer,
    cache_dir: str | Path,
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> tuple[GPTDataset | BlendedDataset | None, ...]:
    """Build the train, valid and test datasets. Collective where torch.distributed is initialised.

    Items are dicts of `tokens`, `labels` (int64 [seq_length], labels shifted by one), `loss_mask` (float32
    [seq_length], 1 everywhere but padding) and `position_ids` (0..seq_length-1: documents in a sample follow one
    another without a reset, as in Qwen2.5's pre-training); a blend adds `dataset_id`.

    Args:
        blend: (weight, prefix of `.bin/.idx`) pairs; weights are normalised.
        seq_length: tokens of a sample.
        seed: of the order of documents and samples.
        split: weights of train, valid and test over the documents of each data set, in file order.
        num_samples: samples wanted of each; more than one pass over the data repeats documents in a new order.
            0 gives None. Part of what decides the order: a resumed run must ask for the same.
        tokenizer: the one the data was made with; ids are checked against its size.
        cache_dir: folder for Megatron's index files, shared by all ranks.
        is_built_on_rank: False where a rank needs no data; must be True on rank 0.

    Raises:
        ConfigError: bad weights, split or counts, or a split too small for one sample.
        InputError: a data set is missing or damaged; on all ranks together.
        StorageError: the cache folder cannot be written.
    """
    weights, prefixes = _check_blend(blend)
    if seq_length < 1 or len(num_samples) != len(SPLITS) or min(num_samples) < 0:
        raise ConfigError(f"seq_length {seq_length}, num_samples {num_samples}: expected >= 1 and three counts >= 0")
    parse_split(split)
    key = _on_rank_zero(lambda: _check_data(prefixes, tokenizer, split, num_samples, seq_length))
    cache = Path(cache_dir) / key[:16]

    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(prefixes, None if len(prefixes) == 1 else weights),
        split=split,
        path_to_cache=str(cache),
        tokenizer=MegatronTokenizerView(tokenizer),
        mid_level_dataset_surplus=_surplus(weights, num_samples),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # A split of which nothing is wanted may hold no document, and Megatron would count its epochs for ever.
    config.split_matrix = [
        ends if count else None for ends, count in zip(config.split_matrix, num_samples, strict=True)
    ]
    is_writer = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    with storage_errors(f"cannot use the cache folder {cache_dir}"):
        if is_writer:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock") if is_writer else nullcontext():
            if is_writer and cache.is_dir() and not (cache / COMPLETE).is_file():
                logger.warning("%s: left by an interrupted run; building its indices again", cache)
                shutil.rmtree(cache)
            if is_writer:
                (cache / COMPLETE).unlink(missing_ok=True)
            datasets = _builder_class()(GPTDataset, list(num_samples), is_built_on_rank, config).build()
            if is_writer:
                atomic_write_text(cache / COMPLETE, json.dumps({"data": key}) + "\n")
    return tuple(datasets)


def _builder_class() -> type[Any]:
    """Megatron's builder, for use with and without a process group."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    class Builder(BlendedMegatronDatasetBuilder):  # type: ignore[misc]
        @staticmethod
        def build_generic_dataset(
            cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
        ) -> Any:
            # With a cache folder, BlendedDataset of 0.16 asks for this process's rank even where there is no
            # process group. Its index takes a moment to build, so without a group it stays in memory.
            if cls is BlendedDataset and not torch.distributed.is_initialized():
                config = copy.copy(args[-1])
                config.path_to_cache = None
                args = (*args[:-1], config)
            return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)

    return Builder


def _check_blend(blend: Sequence[tuple[float, str | Path]]) -> tuple[list[float], list[str]]:
    if not blend:
        raise ConfigError("no data given; expected (weight, prefix) pairs")
    weights, prefixes = [float(weight) for weight, _ in blend], [str(prefix) for _, prefix in blend]
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"blend weights {weights}: expected numbers above 0; leave out a data set of weight 0")
    return weights, prefixes


def _check_data(
    prefixes: Sequence[str],
    tokenizer: QwenTokenizer,
    split: str,
    num_samples: tuple[int, int, int],
    seq_length: int,
) -> str:
    """Check every data set and that each wanted split fills a sample; return the SHA-256 that names the cache."""
    digest = hashlib.sha256()
    for prefix in prefixes:
        index = check_indexed(prefix, vocab_size=tokenizer.vocab_size)
        # Megatron splits sequences; in our files, and in those of its own tools, a document is one.
        for name, part, count in zip(SPLITS, split_documents(len(index.lengths), split), num_samples, strict=True):
            num_tokens = int(index.lengths[part.start : part.stop].sum(dtype=np.int64))
            if count and num_tokens <= seq_length:
                raise ConfigError(
                    f"{prefix}: the {name} split holds {num_tokens} tokens in {len(part)} of {len(index.lengths)} "
                    f"documents, expected more than seq_length {seq_length}; give more data, another split, or "
                    "shorter samples"
                )
        digest.update(np.memmap(idx_path(prefix), mode="r", dtype=np.uint8).data)
        digest.update(str(bin_path(prefix).stat().st_size).encode())
    return digest.hexdigest()


def _surplus(weights: Sequence[float], num_samples: Sequence[int]) -> float:
    """Return the share of extra samples per data set that covers the rounding of the blend.

    Megatron rounds each data set's share up, then draws greedily: at most about two samples per data set more than
    its share. Its default of 0.5% is too little for short runs, and drawing past the end is an error there.
    """
    smallest = min(weights) / sum(weights) * min((count for count in num_samples if count), default=1)
    return max(0.005, 2 * len(weights) / smallest)


def _on_rank_zero(check: Callable[[], _T]) -> _T:
    """Run `check` on rank 0 alone and give all ranks its result, or its error."""
    if not torch.distributed.is_initialized():
        return check()
    outcome: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [check()]
        except QwenError as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    result = outcome[0]
    if isinstance(result, QwenError):
        raise result
    checked: _T = result
    return checked
