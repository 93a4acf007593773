"""The command `megatron-qwen`: collects the verbs, maps our errors to exit codes.

Each file of this folder holds one group of verbs and a `register(app)` that adds them. Heavy
imports (torch, megatron, transformers) belong inside the verb functions, so that `--help` is quick.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

import typer

from megatron_qwen.errors import INTERRUPTED_EXIT_CODE, QwenError

VERB_MODULES = ("info", "data", "convert", "train", "generate", "eval", "bench", "quickstart")


def build_app() -> typer.Typer:
    """Return the typer application with every verb registered."""
    app = typer.Typer(
        name="megatron-qwen",
        help="Train, convert and run Qwen2.5 on Megatron-Core.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for name in VERB_MODULES:
        importlib.import_module(f"megatron_qwen.cli.{name}").register(app)
    return app


def main() -> None:
    """Run the command line; a QwenError becomes one line on stderr and its exit code."""
    level = os.environ.get("MEGATRON_QWEN_LOG", "WARNING").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    # Megatron-Core says so at each of a dozen imports; `doctor` says it once, with what it means.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*Falling back")
    try:
        build_app()()
    except QwenError as error:
        sys.stderr.write(f"megatron-qwen: {type(error).__name__}: {_printable(str(error))}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("megatron-qwen: interrupted\n")
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None


def _printable(message: str) -> str:
    """Escape what names from a stranger's file could send to the terminal."""
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode() for sign in message
    )
