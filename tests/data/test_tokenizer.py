from __future__ import annotations

import base64
import json
import os
import subprocess
import sys

import pytest

from megatron_qwen.data.control_tokens import CONTROL_TOKENS, byte_letters
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError

SAMPLES = [
    "Hello world",
    " Hello  world\n\n\tdef f(x):\r\n    return x**2  # it's 2026 \n",
    "e\u0301 is é, 한국어, 汉字。再见, naïve, 🙂👩\u200d👩\u200d👧",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><tool_call>{}</tool_call><|fim_prefix|>",
    "\x00\x1f\u00a0\u3000\ufeff",
    "",
]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "a < b & 'c'", "parameters": {"été": 1}}}
CALL = {"function": {"name": "weather", "arguments": {"city": "Zürich", "n": [1, None, True]}}}
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "system", "content": "later"},
            {"role": "user", "content": "Bye"},
        ],
        "add_generation_prompt": False,
    },
    {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER, {"name": "noop"}]},
    {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL["function"]]},
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": "25"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "rain"},
        ],
        "tools": [WEATHER],
    },
]
# The text Qwen2.5 publishes for tool use; written out, because both templates under test could share a mistake.
TOOL_TURN = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
    "You may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"name": "noop"}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    "XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
)

TRANSFORMERS_SCRIPT = """
import json, sys
from transformers import AutoTokenizer
folder, request = sys.argv[1], json.load(sys.stdin)
t = AutoTokenizer.from_pretrained(folder)
print(json.dumps({
    "ids": [t.encode(s, add_special_tokens=False) for s in request["samples"]],
    "chat": [t.apply_chat_template(c["messages"], tools=c.get("tools"), tokenize=False,
             add_generation_prompt=c.get("add_generation_prompt", True)) for c in request["conversations"]],
    "decoded": [t.decode(t.encode(s, add_special_tokens=False), skip_special_tokens=True) for s in request["samples"]],
    "eos": t.eos_token_id, "pad": t.pad_token_id, "size": len(t), "bos": t.bos_token_id,
}))
"""


def test_training_gives_exact_size_and_control_tokens_after_the_regular_ones(tokenizer):
    assert tokenizer.vocab_size == 600
    first = 600 - 22
    assert tokenizer.eod_id == tokenizer.eos_id == first
    for offset, (text, special) in enumerate(CONTROL_TOKENS):
        assert tokenizer.encode(text) == [first + offset]
        assert tokenizer.decode([first + offset], skip_special_tokens=True) == ("" if special else text)
    assert [tokenizer.backend.id_to_token(i) for i in range(256)] == sorted(byte_letters())


@pytest.mark.parametrize("text", SAMPLES)
def test_decoding_gives_back_the_text_in_normal_form(tokenizer, text):
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert len(tokenizer.encode("2026")) == 4


def test_training_twice_gives_the_same_tokenizer(tokenizer, library_texts):
    again = QwenTokenizer.train(library_texts, 600)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert QwenTokenizer.train(library_texts, 599).fingerprint() != tokenizer.fingerprint()


def test_smallest_vocabulary_is_bytes_and_control_tokens(library_texts):
    assert QwenTokenizer.train(library_texts, 278).encode("ab") == [64, 65]
    with pytest.raises(ConfigError, match="at least 278"):
        QwenTokenizer.train(library_texts, 277)


def test_more_tokens_than_the_text_supports_is_an_error_with_the_reachable_size():
    with pytest.raises(ConfigError, match=r"supports only 28\d tokens"):
        QwenTokenizer.train(["abc abc"], 400)


@pytest.mark.parametrize("style", ["base", "chat"])
def test_saved_folder_means_the_same_to_transformers(tokenizer, tmp_path, style):
    tokenizer.save(tmp_path, style=style)
    ours = QwenTokenizer.load(tmp_path)
    assert ours.fingerprint() == tokenizer.fingerprint()
    assert ours.eod_id == tokenizer.eod_id
    request = json.dumps({"samples": SAMPLES, "conversations": CONVERSATIONS})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    theirs = json.loads(
        subprocess.run(
            [sys.executable, "-c", TRANSFORMERS_SCRIPT, str(tmp_path)],
            input=request, capture_output=True, text=True, check=True, timeout=120, env=environment,
        ).stdout
    )  # fmt: skip
    assert theirs["ids"] == [ours.encode(text) for text in SAMPLES]
    assert theirs["decoded"] == [ours.decode(ours.encode(text), skip_special_tokens=True) for text in SAMPLES]
    assert theirs["chat"] == [
        ours.apply_chat(c["messages"], tools=c.get("tools"), add_generation_prompt=c.get("add_generation_prompt", True))
        for c in CONVERSATIONS
    ]
    assert (theirs["eos"], theirs["pad"], theirs["bos"]) == (ours.eos_id, ours.eod_id, None)
    assert theirs["size"] == ours.vocab_size
    assert ours.eos_id == ours.eod_id + (2 if style == "chat" else 0)


def test_chat_text_is_the_published_one(tokenizer):
    text = tokenizer.apply_chat([{"role": "user", "content": "Go"}], tools=[{"name": "noop"}])
    assert text == TOOL_TURN
    results = tokenizer.apply_chat(CONVERSATIONS[4]["messages"], add_generation_prompt=False)
    assert (
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\n25\n</tool_response><|im_end|>\n"
        in results
    )
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "n": [1, null, true]}}'
        in results
    )


def test_the_folders_own_template_is_used_and_kept(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}!")
    loaded = QwenTokenizer.load(tmp_path / "a")
    assert loaded.apply_chat([{"role": "user", "content": "x"}]) == "x<|endoftext|>!"
    loaded.save(tmp_path / "b")
    assert QwenTokenizer.load(tmp_path / "b").apply_chat([{"role": "user", "content": "y"}]) == "y<|endoftext|>!"


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for m in messages %}", "{{ raise_exception('no') }}"],
)
def test_hostile_or_broken_templates_are_refused(tokenizer, tmp_path, template):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="chat template"):
        QwenTokenizer.load(tmp_path).apply_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": None}, {"role": "robot", "content": "x"}, {"role": "user"}]
)
def test_messages_that_cannot_be_rendered_are_refused(tokenizer, message):
    with pytest.raises(ConfigError, match="chat template"):
        tokenizer.apply_chat([message])


def write_tiktoken(tokenizer: QwenTokenizer, path) -> None:
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    regular = [tokenizer.backend.id_to_token(i) for i in range(tokenizer.eod_id)]
    path.write_text(
        "".join(
            f"{base64.b64encode(bytes(byte_of[c] for c in token)).decode()} {rank}\n"
            for rank, token in enumerate(regular)
        )
    )


def test_tiktoken_ranks_give_back_the_merges_exactly(tokenizer, library_texts, tmp_path):
    write_tiktoken(tokenizer, tmp_path / "qwen.tiktoken")
    rebuilt = QwenTokenizer.load(tmp_path)
    assert rebuilt.fingerprint() == tokenizer.fingerprint()
    assert [rebuilt.encode(text) for text in SAMPLES] == [tokenizer.encode(text) for text in SAMPLES]
    assert QwenTokenizer.load(tmp_path / "qwen.tiktoken").vocab_size == 600


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:300] + lines[301:], "line 301: .* expected a new token with rank 300"),
        (lambda lines: [*lines, lines[5]], "expected a new token with rank 578"),
        (lambda lines: [*lines, "!!! 578"], "line 579: expected base64"),
        (lambda lines: lines[10:], "line 1: "),
        (lambda lines: lines[:200], "56 of the 256 single bytes are missing"),
        (
            lambda lines: [*lines, base64.b64encode(b"\x01\x02\x03\x04").decode() + " 578"],
            "cannot be made by one merge",
        ),
    ],
)
def test_damaged_tiktoken_files_are_refused(tokenizer, tmp_path, edit, message):
    path = tmp_path / "qwen.tiktoken"
    write_tiktoken(tokenizer, path)
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(CorruptInputError, match=message):
        QwenTokenizer.load(path)


def test_instruct_style_tokenizers_separate_documents_by_endoftext(tokenizer, tmp_path):
    tokenizer.save(tmp_path, style="chat")
    loaded = QwenTokenizer.load(tmp_path)
    assert loaded.decode([loaded.eod_id]) == "<|endoftext|>"
    assert loaded.decode([loaded.eos_id]) == "<|im_end|>"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [
        loaded.eos_id,
        loaded.eod_id,
    ]


def test_bad_folders_are_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(IncompleteInputError, match=r"no tokenizer\.json or qwen\.tiktoken"):
        QwenTokenizer.load(tmp_path)
    with pytest.raises(IncompleteInputError, match="no such file"):
        QwenTokenizer.load(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CorruptInputError, match=r"tokenizer\.json"):
        QwenTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CorruptInputError, match=r"tokenizer_config\.json: expected a JSON object"):
        QwenTokenizer.load(tmp_path)


def test_a_qwen_tokenizer_that_lost_its_normalizer_gets_it_back(tokenizer, tmp_path, caplog):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": None}))
    assert QwenTokenizer.load(tmp_path).encode("e\u0301") == tokenizer.encode("\u00e9")
    assert "using NFC" in caplog.text
    assert QwenTokenizer.load(path).encode("e\u0301") != tokenizer.encode("\u00e9")  # the file alone means itself


def test_a_tokenizer_without_endoftext_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    Tokenizer(BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="endoftext"):
        QwenTokenizer.load(tmp_path)
