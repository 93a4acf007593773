"""QwenTokenizer: the one tokenizer class of the project, over the `tokenizers` library."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, normalizers

from megatron_qwen.checkpoint.atomic import atomic_write_text, storage_errors
from megatron_qwen.data.bpe import read_tiktoken, train_bpe
from megatron_qwen.data.chat_template import QWEN_CHAT_TEMPLATE, render_chat
from megatron_qwen.data.control_tokens import CONTROL_TOKENS, END_OF_DOCUMENT, END_OF_TURN, PRETOKENIZER_PATTERN
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError

logger = logging.getLogger(__name__)

MAX_LENGTH = 131072
STYLES = ("base", "chat")


class QwenTokenizer:
    """Text to token ids and back, with Qwen's control tokens and chat format.

    `eod_id` is always `<|endoftext|>`, the document separator of pre-training, even where the folder's
    `eos_token` (`eos_id`) is `<|im_end|>`, as chat tokenizers have it.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        source: str,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap `backend`; use `load` or `train`.

        Raises:
            ConfigError: `backend` has no `<|endoftext|>`, or not the `eos_token` that `config` names.
        """
        self.backend = backend
        self.source = source
        self.config = dict(config) if config is not None else None
        self.generation_config = dict(generation_config) if generation_config is not None else None
        self.chat_template = chat_template
        self.eod_id = self._id_of(END_OF_DOCUMENT)
        self.eos_id = self._id_of(_token_text((config or {}).get("eos_token")) or END_OF_DOCUMENT)

    @classmethod
    def load(cls, source: str | Path) -> QwenTokenizer:
        """Read a Hugging Face folder with `tokenizer.json`, such a file, or `qwen.tiktoken` (file or in a folder).

        Raises:
            IncompleteInputError: nothing to load at `source`.
            CorruptInputError: a file is not what its name says.
            ConfigError: a tokenizer without `<|endoftext|>`.
        """
        path = Path(source)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "qwen.tiktoken") if (path / name).is_file()]
            if not found:
                raise IncompleteInputError(f"{path}: no tokenizer.json or qwen.tiktoken in this folder")
            return cls._from_file(found[0], companions=path)
        return cls._from_file(path, companions=None)

    @classmethod
    def _from_file(cls, path: Path, companions: Path | None) -> QwenTokenizer:
        backend = read_tiktoken(path) if path.suffix == ".tiktoken" else _read_tokenizer_json(path)
        if companions is None:
            return cls(backend, source=str(path))
        config = _read_json_object(companions / "tokenizer_config.json")
        _restore_normalizer(backend, config, path)
        return cls(
            backend,
            source=str(companions),
            config=config,
            generation_config=_read_json_object(companions / "generation_config.json"),
            chat_template=_read_chat_template(companions, config),
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> QwenTokenizer:
        """Train a byte-level BPE with Qwen's rules on `texts`; `vocab_size` counts the 22 control tokens.

        Raises:
            ConfigError: `vocab_size` below 278, or more than the text supports.
        """
        return cls(train_bpe(texts, vocab_size), source="trained here")

    def save(self, folder: str | Path, *, style: str | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` (with the chat template) and `generation_config.json`.

        Args:
            folder: created if needed; files of these names are replaced.
            style: "base" (eos `<|endoftext|>`) or "chat" (eos `<|im_end|>`, sampling defaults). None keeps what the
                tokenizer was loaded with, "base" where it had nothing.

        Raises:
            ConfigError: unknown style.
            StorageError: the folder cannot be written.
        """
        if style is not None and style not in STYLES:
            raise ConfigError(f"tokenizer style {style!r}: expected one of {', '.join(STYLES)}")
        keep = style is None
        config = self.config if keep and self.config is not None else self._hf_config(style or "base")
        config = {**config, "chat_template": self.chat_template or QWEN_CHAT_TEMPLATE}
        generation = self.generation_config if keep and self.generation_config is not None else None
        target = Path(folder)
        with storage_errors(f"cannot create {target}"):
            target.mkdir(parents=True, exist_ok=True)
        atomic_write_text(target / "tokenizer.json", self.backend.to_str(pretty=True))
        atomic_write_text(target / "tokenizer_config.json", _to_json(config))
        atomic_write_text(
            target / "generation_config.json", _to_json(generation or self._generation_defaults(style or "base"))
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; control tokens written in it become their ids, nothing is added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text (threads, unless TOKENIZERS_PARALLELISM=false)."""
        return [list(item.ids) for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special_tokens: leave out tokens flagged special; `<tool_call>` and the fill-in-the-middle
                tokens are not, and stay.
        """
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt text of a conversation: the folder's own chat template, Qwen2.5's if it has none.

        Args:
            messages: `{"role": ..., "content": ...}`, roles system, user, assistant, tool.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: end with the opening of an assistant turn.

        Raises:
            ConfigError: the template cannot render these messages.
        """
        config = self.config or {}
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return render_chat(
            self.chat_template or QWEN_CHAT_TEMPLATE,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            special_tokens={name: text for name in names if (text := _token_text(config.get(name)))},
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """Highest token id plus one, control tokens included (151,665 for Qwen2.5, whose models have more rows)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def splits_like_qwen(self) -> bool:
        """Whether the pre-tokenizer is Qwen's and no added token holds a space, so that long texts may be cut."""
        steps = (self._description.get("pre_tokenizer") or {}).get("pretokenizers", [])
        if len(steps) != 2 or steps[0].get("pattern") != {"Regex": PRETOKENIZER_PATTERN}:
            return False
        normalizer = self._description.get("normalizer")
        return (
            steps[1]["type"] == "ByteLevel"
            and not steps[1]["add_prefix_space"]
            and not steps[1]["use_regex"]
            and (normalizer is None or normalizer["type"] == "NFC")
            and all(_is_plain(token) for token in self._description["added_tokens"])
        )

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self.backend.to_str())
        return described

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of everything that decides the ids: vocabulary, merges, rules, added tokens."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        parts = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        canonical = json.dumps({part: self._description[part] for part in parts}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _id_of(self, text: str) -> int:
        found = self.backend.token_to_id(text)
        if found is None:
            raise ConfigError(
                f"{self.source}: the tokenizer has no {text} token; expected a Qwen tokenizer "
                f"(its control tokens start with {END_OF_DOCUMENT})"
            )
        return int(found)

    def _hf_config(self, style: str) -> dict[str, Any]:
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        present = [(text, special, self.backend.token_to_id(text)) for text, special in CONTROL_TOKENS]
        return {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token_id): {"content": text, **flags, "special": special}
                for text, special, token_id in present
                if token_id is not None
            },
            "additional_special_tokens": [text for text, special, _ in present if special and text != END_OF_DOCUMENT],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TURN if style == "chat" else END_OF_DOCUMENT,
            "errors": "replace",
            "model_max_length": MAX_LENGTH,
            "pad_token": END_OF_DOCUMENT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }

    def _generation_defaults(self, style: str) -> dict[str, Any]:
        if style == "base":
            return {
                "bos_token_id": self.eod_id,
                "eos_token_id": self.eod_id,
                "do_sample": False,
                "max_new_tokens": 2048,
            }
        return {
            "bos_token_id": self.eod_id,
            "pad_token_id": self.eod_id,
            "eos_token_id": [self._id_of(END_OF_TURN), self.eod_id],
            "do_sample": True,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
        }


def _read_tokenizer_json(path: Path) -> Tokenizer:
    if not path.is_file():
        raise IncompleteInputError(f"{path}: no such file; expected a folder with tokenizer.json, or such a file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CorruptInputError(f"{path}: not a tokenizer.json that this `tokenizers` can read: {error}") from error


def _restore_normalizer(backend: Tokenizer, config: Mapping[str, Any] | None, path: Path) -> None:
    """Give a Qwen2 tokenizer the NFC that its class implies, where its file has lost it (conversion from GGUF does).

    transformers 5 builds these classes with NFC whatever the file says; without it accents typed as two
    characters would get other ids here than there.
    """
    is_qwen = str((config or {}).get("tokenizer_class", "")).startswith("Qwen2Tokenizer")
    if is_qwen and backend.normalizer is None:
        logger.warning("%s: no normalizer, though Qwen2 tokenizers have NFC; using NFC", path)
        backend.normalizer = normalizers.NFC()


def _read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the content of `path`, None if there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptInputError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptInputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_chat_template(folder: Path, config: Mapping[str, Any] | None) -> str | None:
    """Return the folder's template: `chat_template.jinja` (transformers 5), or the key in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = (config or {}).get("chat_template")
    if isinstance(template, list):  # named templates; transformers takes the one called "default"
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CorruptInputError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return template


def _token_text(value: Any) -> str | None:
    """Return the text of a token entry of tokenizer_config.json: a string, or an object with `content`."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _is_plain(token: Mapping[str, Any]) -> bool:
    """Whether an added token matches its own characters only, none of them one at which long texts are cut."""
    return not (
        token["lstrip"]
        or token["rstrip"]
        or token["single_word"]
        or any(character.isspace() or character in "\u3002\uff0c" for character in token["content"])
    )


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
