"""What `--help` shows of every verb."""

from __future__ import annotations

from collections.abc import Iterator

import click
import typer
from rich.text import Text

from megatron_qwen.cli.app import build_app


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
