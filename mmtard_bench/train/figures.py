"""Figures of a training run: loss terms, accuracies, agreement with the teachers, their weights."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmtard_bench.train.checkpoint import storage

Line = dict[str, Any]


def series(lines: Iterable[Line], key: str, against: str = "step") -> tuple[list[float], ...]:
    """The values of ``key`` in a history, and where they were recorded: (x values, y values)."""
    found = [(line[against], line[key]) for line in lines if key in line]
    return [x for x, _ in found], [y for _, y in found]


def diagnostics(lines: Sequence[Line], path: Path) -> None:
    """Draw the history of a run as a PNG with four panels. Raises StorageError."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    losses, accuracies, agreement, weights = figure.subplots(2, 2).flat
    _lines(losses, lines, "loss/", "loss terms")
    if all(min(line.get_ydata()) > 0 for line in losses.lines):
        losses.set_yscale("log")  # the cosines of sim-clip are negative
    _lines(accuracies, lines, "train/", "accuracy")
    for key, style in (("validation/clean", "o-"), ("validation/robust", "s-")):
        accuracies.plot(*series(lines, key), style, label=key, markersize=4)
    _lines(agreement, lines, "agreement/", "share of images on which student and teacher agree")
    _fans(weights, lines)
    for axes in (losses, accuracies, agreement, weights):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="grey")
    save(figure, path)


def _lines(axes: Axes, lines: Sequence[Line], prefix: str, title: str) -> None:
    axes.set_title(title, fontsize=10)
    for key in dict.fromkeys(key for line in lines for key in line if key.startswith(prefix)):
        steps, values = series(lines, key)
        axes.plot(steps, values, marker=_marker(steps), label=key)


def _marker(steps: Sequence[float]) -> str:
    """A marker for a curve of one point, which has no line."""
    return "o" if len(steps) == 1 else ""


def _fans(axes: Axes, lines: Sequence[Line]) -> None:
    """The distribution of each per-sample weight over time, as a median with two bands."""
    axes.set_title("per-sample teacher weights: median, deciles 1 to 9, range", fontsize=10)
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("weights/"))
    for number, key in enumerate(keys):
        steps, rows = series(lines, key)
        colour = f"C{number}"
        columns: list[Any] = list(zip(*rows, strict=True))
        axes.plot(steps, columns[5], marker=_marker(steps), color=colour, label=key)
        axes.fill_between(steps, columns[1], columns[9], color=colour, alpha=0.25, linewidth=0)
        axes.fill_between(steps, columns[0], columns[10], color=colour, alpha=0.1, linewidth=0)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all. Raises StorageError."""
    temporary = path.with_suffix(".partial")
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(path)
