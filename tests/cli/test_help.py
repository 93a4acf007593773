"""What `--help` shows of every verb, and whether the documents name verbs and options that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import typer
from rich.text import Text

from megatron_qwen.cli.app import build_app

ROOT = Path(__file__).parents[2]


def commands(command: click.Command, name: str = "megatron-qwen") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for inner, each in getattr(command, "commands", {}).items():
        yield from commands(each, f"{name} {inner}")


def test_no_help_is_taken_for_markup_and_left_out() -> None:
    texts = {
        f"{name} {parameter.name}": getattr(parameter, "help", None) or ""
        for name, command in commands(typer.main.get_command(build_app()))
        for parameter in command.params
    }
    assert len(texts) > 150
    assert [where for where, text in texts.items() if Text.from_markup(text).plain != text] == []


def documented() -> Iterator[tuple[str, list[str]]]:
    """Yield (file, words) of every command line in the documents, without its comment."""
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:megatron-qwen|python -m megatron_qwen) ([^`\n]+)", text):
            yield file.name, re.sub(r"(^|\s)#.*", "", line).split()


def test_documented_commands_have_options_that_exist() -> None:
    known = dict(commands(typer.main.get_command(build_app())))
    found, unknown = 0, []
    for file, words in documented():
        name, rest = "megatron-qwen", list(words)
        while rest and f"{name} {rest[0]}" in known:
            name = f"{name} {rest.pop(0)}"
        options = {each for parameter in known[name].params for each in (*parameter.opts, *parameter.secondary_opts)}
        if hasattr(known[name], "commands") and rest and rest[0].isalpha():
            unknown.append(f"{file}: no verb {name} {rest[0]}")
        asked = {match[0] for word in rest if (match := re.match(r"--[a-z-]+", word.lstrip("[(")))}
        unknown += [f"{file}: {name} {option}" for option in sorted(asked - options - {"--help"})]
        found += 1
    assert unknown == []
    assert found > 90
