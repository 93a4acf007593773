"""The pictures of the evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qwen.checkpoint.atomic import staging_path, storage_errors

if TYPE_CHECKING:
    from megatron_qwen.evaluation.perplexity import WindowLoss
    from megatron_qwen.evaluation.sparse_calibration import HeadCalibration


def draw_heat_map(table: Mapping[int, Mapping[float, float]], target: Path, *, title: str) -> None:
    """Draw retrieval by length (columns) and depth (rows) into a PNG, green for always found and red for never.

    Args:
        table: share of correct answers, by length and depth; all lengths with the same depths.
        target: the PNG to write or replace.
        title: above the plot.
    """
    lengths, depths = list(table), list(next(iter(table.values())))
    figure, axes = _axes((max(5.0, 2.2 + 0.8 * len(lengths)), 1.8 + 0.45 * len(depths)))
    cells = [[table[length][depth] for length in lengths] for depth in depths]
    image = axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, shares in enumerate(cells):
        for column, share in enumerate(shares):
            colour = "black" if 0.2 < share < 0.8 else "white"  # on what the map has there
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="tokens", ylabel="depth of the key")
    axes.set_title(title, fontsize=8)
    figure.colorbar(image, label="found")
    _save(figure, target)


def draw_losses(curves: Mapping[str, Sequence[WindowLoss]], target: Path, *, title: str) -> None:
    """Draw loss over position, a stair per curve, into a PNG.

    Args:
        curves: windows by name.
        target: the PNG to write or replace.
        title: above the plot.
    """
    figure, axes = _axes((7, 4))
    for name, windows in curves.items():
        edges = [*(each.start for each in windows), windows[-1].end]
        axes.stairs([each.loss for each in windows], edges, label=name, baseline=None)
    axes.set(xlabel="position (tokens)", ylabel="loss (nats per token)")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, target)


def draw_calibration(layers: Sequence[Sequence[HeadCalibration]], target: Path, *, title: str) -> None:
    """Draw recall, and the share of pairs kept, by layer (rows) and head (columns), into a PNG.

    Args:
        layers: heads of each layer.
        target: the PNG to write or replace.
        title: above the plot.
    """
    figure, axes = _axes((max(7.0, 2.0 + 0.4 * len(layers[0])), 1.6 + 0.16 * len(layers)), columns=2)
    panels = [
        ("recall", [[each.recall for each in layer] for layer in layers], "RdYlGn"),
        ("pairs kept", [[each.kept for each in layer] for layer in layers], "Blues"),
    ]
    for one, (name, cells, colours) in zip(axes, panels, strict=True):
        image = one.imshow(cells, cmap=colours, vmin=0 if name == "pairs kept" else None, vmax=1, aspect="auto")
        one.set(xlabel="query head", ylabel="layer", title=name)
        figure.colorbar(image, ax=one)
    figure.suptitle(title, fontsize=8)
    _save(figure, target)


def _axes(size: tuple[float, float], *, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, target: Path) -> None:
    draft = staging_path(target)
    with storage_errors(f"cannot write {target}"):
        figure.savefig(draft, format="png", dpi=100)
        draft.replace(target)
