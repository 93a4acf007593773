"""What makes a byte-level BPE a Qwen2.5 tokenizer: the pre-tokenizer, the control tokens, the bytes' letters."""

from __future__ import annotations

PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's split of text into words before BPE; every digit stands alone."""

END_OF_DOCUMENT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"

CONTROL_TOKENS: tuple[tuple[str, bool], ...] = (
    (END_OF_DOCUMENT, True),
    (START_OF_TURN, True),
    (END_OF_TURN, True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
)
"""(text, special) in id order, directly after the regular tokens; skip_special_tokens drops the special ones only."""

NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(CONTROL_TOKENS)


def byte_letters() -> list[str]:
    """Return the printable character that stands for each byte value in `tokenizer.json`, index = byte.

    Printable Latin-1 bytes stand for themselves, the others take U+0100 and up in byte order (the GPT-2 rule).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]
