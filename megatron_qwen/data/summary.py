"""What a `.bin/.idx` holds, after all checks; no torch, no megatron."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qwen.data.indexed import check_indexed, map_tokens, token_range
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError

SPLITS = ("train", "valid", "test")
SAMPLE_TOKENS = 64
COUNT_TOKENS = 1 << 22


def describe(prefix: str | Path, tokenizer: QwenTokenizer | None = None, *, document: int = 0) -> dict[str, Any]:
    """Check a data set and return its figures as plain JSON values.

    Args:
        prefix: path without `.bin`.
        tokenizer: check that ids are below its size, count its `<|endoftext|>`, decode the sample.
        document: its first 64 tokens are the sample.

    Raises:
        InputError: missing or damaged files, ids out of range.
        ConfigError: no such document.
    """
    index = check_indexed(prefix, vocab_size=tokenizer.vocab_size if tokenizer else None)
    num_documents = len(index.document_indices) - 1
    if not 0 <= document < num_documents:
        raise ConfigError(f"document {document}: {prefix} holds documents 0 to {num_documents - 1}")
    starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.document_indices]
    lengths = np.diff(starts)
    tokens = map_tokens(prefix, index)
    begin, end = int(starts[document]), int(starts[document + 1])
    sample = tokens[begin : min(end, begin + SAMPLE_TOKENS)].tolist()
    smallest, largest = token_range(prefix, index)
    report = {
        "prefix": str(prefix),
        "documents": num_documents,
        "sequences": len(index.lengths),
        "tokens": index.num_tokens,
        "dtype": index.dtype.name,
        "smallest_id": smallest,
        "largest_id": largest,
        "length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "p99": float(np.percentile(lengths, 99)),
            "max": int(lengths.max()),
        },
        "unigram_entropy": unigram_entropy(prefix),
        "sample_ids": sample,
    }
    if tokenizer:
        last = tokens[starts[1:][lengths > 0] - 1]
        report["sample"] = tokenizer.decode(sample)
        report["documents_ending_in_eod"] = int(np.count_nonzero(last == tokenizer.eod_id))
    return report


def unigram_entropy(prefix: str | Path, *, documents: range | None = None) -> float:
    """Return the entropy of the token frequencies, -sum p ln p, in nats per token.

    It is the loss of the best model that ignores context; a model that has learned anything is below it.

    Args:
        prefix: of `.bin/.idx`.
        documents: consecutive documents to count; None counts all. `split_documents` gives those of a split.

    Raises:
        InputError: the data set is missing or damaged.
        ConfigError: `documents` is empty or leaves the data set.
    """
    index = check_indexed(prefix)
    num_documents = len(index.document_indices) - 1
    documents = range(num_documents) if documents is None else documents
    if not documents or documents.step != 1 or documents.start < 0 or documents.stop > num_documents:
        raise ConfigError(f"{documents}: expected consecutive documents of the {num_documents} in {prefix}")
    starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    begin = int(starts[index.document_indices[documents.start]])
    end = int(starts[index.document_indices[documents.stop]])
    tokens = map_tokens(prefix, index)
    counts = np.zeros(0, np.int64)
    for chunk in range(begin, end, COUNT_TOKENS):
        part = np.bincount(tokens[chunk : min(chunk + COUNT_TOKENS, end)].astype(np.int64), minlength=counts.size)
        part[: counts.size] += counts
        counts = part
    share = counts[counts > 0] / (end - begin)
    return float(-(share * np.log(share)).sum())


def parse_split(split: str) -> tuple[float, float, float]:
    """Return the fractions of "98,2,0".

    Raises:
        ConfigError: not three numbers >= 0 with a sum above 0.
    """
    try:
        numbers = [float(part) for part in split.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(SPLITS) or not all(math.isfinite(n) and n >= 0 for n in numbers) or sum(numbers) == 0:
        raise ConfigError(f"split {split!r}: expected three weights for train, valid and test, such as 98,2,0")
    total = numbers[0] + numbers[1] + numbers[2]
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def split_documents(num_documents: int, split: str) -> tuple[range, range, range]:
    """Return the documents that Megatron gives to train, valid and test."""
    # Added up one by one as Megatron does: sum() rounds differently from Python 3.12 on.
    ends = [round(end * num_documents) for end in itertools.accumulate(parse_split(split), initial=0.0)]
    return range(ends[0], ends[1]), range(ends[1], ends[2]), range(ends[2], ends[3])
