"""The guided tour behind `make quickstart`: every step is a command a user can type, and does type next.

Text that every Python installation carries (its standard library) becomes a tokenizer and a `.bin/.idx`
pair; a dense Qwen2.5 (TP 2 x PP 2) and a Qwen MoE with shared experts (EP 2) are trained on it over gloo or
NCCL ranks; both are exported to Hugging Face, judged by transformers, and asked for text. With a Hugging
Face folder as `model` the same tour starts from its weights instead.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_qwen.errors import ConfigError, MismatchError, NumericsError, QwenError

VOCAB_SIZE = 2048
SEED_PROMPT = "def __init__(self, "
PARITY_TOKENS = (2, 96)  # sequences, tokens each
# Logits of two correct fp32 implementations differ by rounding only; issue and design ask for 1e-4 of their range.
PARITY_TOLERANCE = 1e-4
# A model that has learnt nothing but token frequencies sits at the unigram entropy; a good run ends far below it.
REQUIRED_FRACTION_OF_ENTROPY = 0.75


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training of the tour: a name, the model argument, and what to pass to `train pretrain`."""

    name: str
    model: str
    nproc: int
    options: tuple[str, ...]
    learns_from_scratch: bool = True


SCRATCH_RUNS = (
    TrainingRun(
        name="dense",
        model="tiny",
        nproc=4,
        options=("--tp", "2", "--pp", "2", "--steps", "400", "--micro-batch-size", "8", "--global-batch-size", "16"),
    ),
    TrainingRun(
        name="moe",
        model="tiny-moe",
        nproc=2,
        options=("--ep", "2", "--steps", "320", "--micro-batch-size", "8", "--global-batch-size", "16"),
    ),
)


def continued_run(model: Path) -> TrainingRun:
    """Return the run that continues from a Hugging Face folder: few steps, small rate, half the weights per rank."""
    options = (
        "--tp", "2", "--seq-length", "256", "--steps", "4", "--micro-batch-size", "1", "--global-batch-size", "2",
        "--lr", "5e-6",
        # With one data-parallel rank there is nothing to distribute, and saving the distributed form gathers a second
        # copy of the optimizer state: 13.5 GB per rank for a 0.6B model at TP 2, more than a small machine has for two.
        "--set", "optimizer.distributed=false",
    )  # fmt: skip
    return TrainingRun(name="continued", model=str(model), nproc=2, options=options, learns_from_scratch=False)


@dataclass(frozen=True)
class Outcome:
    """What one training run of the tour showed. Losses in nats per token, error as a fraction of the logit range."""

    name: str
    first_loss: float
    last_loss: float
    tokens_per_second: float
    parity_error: float
    text: str
    loss_curve: str
    checkpoint: str
    huggingface: str


@dataclass(frozen=True)
class Tour:
    """Folder and printer shared by the steps of one quickstart."""

    out: Path
    console: Console = field(default_factory=Console)

    def run(self, title: str, *arguments: str, capture: bool = False) -> str:
        """Run `megatron-qwen ARGUMENTS` the way a user would, showing the command and its output.

        Args:
            title: heading above the command.
            arguments: the command line after `megatron-qwen`.
            capture: return what the command printed on stdout instead of showing it.

        Raises:
            QwenError: the command failed; its own message is already on the screen.
        """
        self.console.rule(f"[bold]{title}", align="left")
        self.console.print(f"[dim]$ megatron-qwen {shlex.join(arguments)}", soft_wrap=True, highlight=False)
        self.console.file.flush()
        command = [sys.executable, "-m", "megatron_qwen", *arguments]
        result = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if capture else None)
        if result.returncode:
            error = QwenError(f"step '{title}' ended with status {result.returncode}; its message is above")
            error.exit_code = result.returncode
            raise error
        return result.stdout or ""


def copy_standard_library(folder: Path) -> Path:
    """Copy the `.py` files and documentation texts of the running Python's standard library into `folder`.

    Raises:
        ConfigError: this Python ships fewer than a megabyte of sources (a stripped or zipped installation).
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(library.glob("*.py")) + sorted((library / "pydoc_data").glob("*.py"))
    size = sum(path.stat().st_size for path in sources)
    if size < 1_000_000:
        raise ConfigError(
            f"{library}: found {size:,} bytes of Python sources, expected at least 1,000,000; use a Python "
            "installation with its standard library as files, or pass your own text with --text FOLDER"
        )
    folder.mkdir(parents=True)
    for path in sources:
        shutil.copyfile(path, folder / path.name)
    return folder


def run_quickstart(out: Path, *, model: Path | None = None, text: list[Path] | None = None) -> list[Outcome]:
    """Run the whole tour into `out`, print the summary and write `out/summary.json`.

    Args:
        out: folder for everything the tour makes; must not exist or be empty.
        model: Hugging Face folder to continue from; None trains a dense and an MoE model from scratch.
        text: files or folders to learn from; None takes the standard library.

    Raises:
        ConfigError: `out` is in the way.
        NumericsError: a model did not learn.
        MismatchError: transformers computes other logits from the export than we do.
        QwenError: a command of the tour failed.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: exists and is not empty; choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tour = Tour(out)
    data, tokenizer = prepare_text(tour, model, text)
    entropy = measure_unigram_entropy(data)
    runs = SCRATCH_RUNS if model is None else (continued_run(model),)
    outcomes = [train_export_judge(tour, run, data, tokenizer) for run in runs]
    summarise(tour, outcomes, entropy, time.monotonic() - start)
    for run, outcome in zip(runs, outcomes, strict=True):
        check_outcome(run, outcome, entropy)
    tour.console.print("[bold green]quickstart: all checks passed")
    return outcomes


def prepare_text(tour: Tour, model: Path | None, text: list[Path] | None) -> tuple[Path, Path]:
    """Make `.bin/.idx` (and a tokenizer unless `model` brings one); return data prefix and tokenizer folder."""
    sources = [str(path) for path in text] if text else [str(copy_standard_library(tour.out / "text"))]
    tokenizer = model or tour.out / "tokenizer"
    data = tour.out / "data" / "text"
    if model is None:
        tour.run(
            "1. Train a byte-level BPE with Qwen's rules",
            "data", "tokenizer", *sources, "--vocab-size", str(VOCAB_SIZE), "--out", str(tokenizer),
        )  # fmt: skip
    tour.run(
        "2. Turn text into Megatron's .bin/.idx",
        "data", "prepare", *sources, "--tokenizer", str(tokenizer), "--out", str(data), "--workers", "2",
    )  # fmt: skip
    return data, tokenizer


def measure_unigram_entropy(data: Path) -> float:
    """Return the entropy of the token frequencies of `data`, in nats per token."""
    from megatron_qwen.data.summary import unigram_entropy

    return unigram_entropy(data)


def train_export_judge(tour: Tour, run: TrainingRun, data: Path, tokenizer: Path) -> Outcome:
    """Train one model, export it, compare its logits with transformers, and let it write."""
    folder, exported = tour.out / run.name, tour.out / f"{run.name}-hf"
    tour.run(
        f"3. Train: {run.name}, {run.nproc} ranks",
        "train", "pretrain", "--model", run.model, "--data", str(data), "--tokenizer", str(tokenizer),
        "--out", str(folder), "--nproc", str(run.nproc), *run.options,
    )  # fmt: skip
    tour.run(f"4. Export to Hugging Face: {run.name}", "convert", "export", str(folder), str(exported))
    error = parity_error(tour, folder, exported)
    completion = tour.run(
        f"6. Generate: {run.name}",
        "generate", str(exported), "--prompt", SEED_PROMPT, "--max-new-tokens", "64", "--temperature", "0.7",
        "--seed", "1", "--json",
        capture=True,
    )  # fmt: skip
    return read_outcome(run, folder, exported, completion, error)


def parity_error(tour: Tour, megatron: Path, exported: Path) -> float:
    """Return max |our logits - transformers' logits| / range of the logits, both in fp32, on the same random tokens."""
    import numpy as np
    import torch

    from megatron_qwen.conversion.loading import load_model
    from megatron_qwen.testing.judge import transformers_logits

    tour.console.rule("[bold]5. Ask transformers for a second opinion", align="left")
    vocab_size = json.loads((exported / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocab_size, PARITY_TOKENS)
    theirs = transformers_logits(exported, tokens)
    model = load_model(megatron, dtype=torch.float32).eval()
    positions = torch.arange(tokens.shape[1]).expand(*tokens.shape)
    with torch.no_grad():
        ours = model(torch.from_numpy(tokens), positions, None).float().numpy()
    error = float(np.abs(ours - theirs).max() / (theirs.max() - theirs.min()))
    tour.console.print(f"largest logit difference: {error:.2e} of the logit range (limit {PARITY_TOLERANCE:.0e})")
    return error


def read_outcome(run: TrainingRun, folder: Path, exported: Path, completion: str, error: float) -> Outcome:
    """Collect what the run's own files say."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    text: str = json.loads(completion)["completions"][0]["text"]
    return Outcome(
        name=run.name,
        first_loss=summary["first_loss"],
        last_loss=summary["last_loss"],
        tokens_per_second=summary["tokens_per_second"],
        parity_error=error,
        text=text,
        loss_curve=str(folder / "loss.png"),
        checkpoint=str(folder),
        huggingface=str(exported),
    )


def check_outcome(run: TrainingRun, outcome: Outcome, entropy: float) -> None:
    """Refuse a run that did not learn or whose export is not the same model.

    Raises:
        NumericsError: the loss is not finite, or did not fall as it must.
        MismatchError: the logits of transformers differ by more than the tolerance.
    """
    limit = entropy * REQUIRED_FRACTION_OF_ENTROPY if run.learns_from_scratch else entropy
    if not math.isfinite(outcome.last_loss) or outcome.last_loss > limit:
        raise NumericsError(
            f"{run.name}: the loss ended at {outcome.last_loss:.3f} nats, expected at most {limit:.3f} "
            f"(unigram entropy of the data: {entropy:.3f}); see {outcome.loss_curve}"
        )
    if not outcome.parity_error <= PARITY_TOLERANCE:
        raise MismatchError(
            f"{run.name}: logits of {outcome.huggingface} under transformers differ from {outcome.checkpoint} by "
            f"{outcome.parity_error:.2e} of their range, expected at most {PARITY_TOLERANCE:.0e}; "
            f"run `megatron-qwen convert verify {outcome.checkpoint} {outcome.huggingface}`"
        )


def summarise(tour: Tour, outcomes: list[Outcome], entropy: float, seconds: float) -> None:
    """Print the table of outcomes and write it to `summary.json`."""
    table = Table(title=f"quickstart: {seconds:.0f} s, unigram entropy of the text {entropy:.3f} nats")
    for column in ("", "first loss", "last loss", "tokens/s", "logits vs transformers"):
        table.add_column(column, justify="right" if column else "left")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            f"{outcome.first_loss:.3f}",
            f"{outcome.last_loss:.3f}",
            f"{outcome.tokens_per_second:,.0f}",
            f"{outcome.parity_error:.1e} of range",
        )
    tour.console.print(table)
    for outcome in outcomes:
        tour.console.print(f"[bold]{outcome.name}[/] loss curve {outcome.loss_curve}, export {outcome.huggingface}")
        tour.console.print(f"{outcome.name} continues {SEED_PROMPT!r}:", highlight=False)
        tour.console.print(outcome.text, style="cyan", markup=False, highlight=False)
    record = {"seconds": seconds, "unigram_entropy": entropy, "runs": [vars(outcome) for outcome in outcomes]}
    (tour.out / "summary.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
