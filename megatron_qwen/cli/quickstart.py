"""`megatron-qwen quickstart`: text to tokenizer to training to Hugging Face to generated text, with proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb `quickstart`."""
    app.command("quickstart")(quickstart)


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything the tour makes.")] = Path("quickstart_out"),
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder to continue from, instead of training from scratch."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder to learn from; may be given again. Default: Python's standard library."),
    ] = None,
) -> None:
    """Train, export, judge and run a small dense and a small MoE Qwen model on this machine."""
    from megatron_qwen.recipes.quickstart import run_quickstart

    run_quickstart(out, model=model, text=text)
