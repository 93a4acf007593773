"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from megatron_qwen.checkpoint.atomic import staging_path
from megatron_qwen.training.metrics import read_metrics

PLOT_NAME = "loss.png"


def plot_loss(metrics_path: Path, target: Path, *, unigram_entropy: float | None = None, title: str = "") -> None:
    """Draw training and validation loss over steps into a PNG.

    Args:
        metrics_path: a metrics.jsonl.
        target: the PNG to write or replace.
        unigram_entropy: nats per token; drawn as the line that a model must get well below.
        title: above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = read_metrics(metrics_path)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([each["step"] for each in steps], [each["loss"] for each in steps], label="training")
    valid = [each for each in steps if "valid_loss" in each]
    if valid:
        axes.plot([each["step"] for each in valid], [each["valid_loss"] for each in valid], "o-", label="validation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color="grey", label="unigram entropy of the data")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    draft = staging_path(target)
    figure.savefig(draft, format="png", dpi=120)
    draft.replace(target)
