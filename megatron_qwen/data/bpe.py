"""Qwen-style byte-level BPE built from scratch: trained on text, or rebuilt from `qwen.tiktoken`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from megatron_qwen.data.control_tokens import (
    CONTROL_TOKENS,
    MIN_VOCAB_SIZE,
    NUM_BYTES,
    PRETOKENIZER_PATTERN,
    byte_letters,
)
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE with Qwen's pre-tokenizer and NFC, then add the 22 control tokens.

    Args:
        texts: documents; consumed once.
        vocab_size: number of tokens of the result, control tokens included; at least 256 + 22.

    Raises:
        ConfigError: `vocab_size` is too small, or larger than the text supports.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocabulary size {vocab_size}: expected at least {MIN_VOCAB_SIZE} "
            f"({NUM_BYTES} bytes and {len(CONTROL_TOKENS)} control tokens)"
        )
    tokenizer = _with_qwen_rules(BPE())
    num_regular = vocab_size - len(CONTROL_TOKENS)
    trainer = BpeTrainer(
        vocab_size=num_regular,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != num_regular:
        raise ConfigError(
            f"vocabulary size {vocab_size}: the text supports only {found + len(CONTROL_TOKENS)} tokens; "
            "give more text or a smaller --vocab-size"
        )
    return _with_control_tokens(tokenizer)


def read_tiktoken(path: Path) -> Tokenizer:
    """Build the tokenizer that a `qwen.tiktoken` file (a line per token: base64 bytes, rank) stands for.

    The file has ranks but no merges. The merge that makes a token is what BPE with the lower ranks leaves of its
    bytes: exactly two parts. Inside a longer text no other pair can make it, because a token's bytes merge
    among themselves in the same order wherever they stand.

    Raises:
        IncompleteInputError: no such file.
        CorruptInputError: a line is malformed, ranks are not 0..n-1, a byte is missing, a token cannot be reached.
    """
    ranks = _read_ranks(path)
    letters = byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = _merge_below(token, ranks, rank)
        if len(parts) != 2:
            raise CorruptInputError(
                f"{path}: token {token!r} of rank {rank} cannot be made by one merge of tokens of lower rank "
                f"(they leave {len(parts)} parts); the file is not a byte-level BPE vocabulary, or lines are missing"
            )
        merges.append((spell[parts[0]], spell[parts[1]]))
    model = BPE(vocab={spell[token]: rank for token, rank in ranks.items()}, merges=merges)
    return _with_control_tokens(_with_qwen_rules(model))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return token bytes -> rank, in rank order."""
    if not path.is_file():
        raise IncompleteInputError(f"{path}: no such file")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            raise CorruptInputError(
                f"{path}, line {number}: expected base64 bytes, a space and a rank, got {line[:40]!r}"
            ) from error
        if not token or token in ranks or rank != len(ranks):
            raise CorruptInputError(
                f"{path}, line {number}: token {token!r} with rank {rank}, expected a new token with rank {len(ranks)}"
            )
        ranks[token] = rank
    missing = [byte for byte in range(NUM_BYTES) if bytes([byte]) not in ranks]
    if missing:
        raise CorruptInputError(
            f"{path}: {len(missing)} of the {NUM_BYTES} single bytes are missing, first {missing[0]}"
        )
    return ranks


def _merge_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Return what BPE leaves of `token` when only merges of rank below `limit` are allowed."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        candidates = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _with_qwen_rules(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    first = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in CONTROL_TOKENS])
    ids = [tokenizer.token_to_id(text) for text, _ in CONTROL_TOKENS]
    if ids != list(range(first, first + len(CONTROL_TOKENS))):
        raise CorruptInputError(
            f"control tokens took the ids {ids}, expected {first} and up: the text of one is a regular token already"
        )
    return tokenizer
