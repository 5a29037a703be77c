"""Figures of records: accuracy against eps, and against passes spent. Imports without torch."""

import io
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from mmtard_bench.errors import InputError
from mmtard_bench.files import write_atomically
from mmtard_bench.records.curves import Point, eps_curves
from mmtard_bench.records.schema import Record, digest_of
from mmtard_bench.records.worst import counted
from mmtard_bench.text import printable, slug

_LONGEST = 40
"""Characters of a name in a legend."""


def robust_after(record: Record) -> list[tuple[int, float]]:
    """The share of samples that are still robust after a number of passes per sample.

    Passes are forward + backward. The first point is the clean accuracy after 0 passes, the last
    one the robust accuracy after the most passes that a sample took.
    """
    spent = {s.id: s.forward + s.backward for s in record.samples}
    breaks = Counter(spent[s.id] for s in record.samples if s.broken_by is not None)
    passes = sorted(breaks)
    clean, n = sum(s.clean_correct for s in record.samples), len(record.samples)
    left = accumulate((breaks[p] for p in passes), lambda count, lost: count - lost, initial=clean)
    points = [(p, count / n) for p, count in zip([0, *passes], left, strict=True)]
    most = max(spent.values())
    return points if most == points[-1][0] else [*points, (most, points[-1][1])]


def by_task(records: Sequence[Record]) -> dict[tuple[str, str, str, str], list[Record]]:
    """Finished records by suite name, suite digest, task and data revision.

    Each group is sorted by model, attack and radius, and holds only the records that
    ``worst.counted`` keeps. The names of models with one name and several weights get the digest
    of the weights.
    """
    runs: dict[tuple[tuple[str, str, str, str], str], list[Record]] = defaultdict(list)
    named = _names(records)
    for record in records:
        suite, model = record.suite, record.model
        on = (suite.name, suite.digest) if suite else ("no-suite", record.sample_ids_digest)
        facts = model.model_copy(update={"name": named[model.name, model.digest]})
        where = (*on, record.task.name, record.task.revision)
        runs[where, facts.name].append(record.model_copy(update={"model": facts}))
    places: dict[tuple[str, str, str, str], list[Record]] = defaultdict(list)
    for (where, _), group in runs.items():
        places[where] += [record for record in counted(group)[0] if record.results is not None]
    return {where: sorted(places[where], key=_order) for where in sorted(places) if places[where]}


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the figures of each suite and task as PNG files. Returns their paths.

    Raises InputError if no record is finished, and StorageError if a file cannot be written.
    """
    groups = by_task(records)
    if not groups:
        raise InputError("No record is finished, so there is nothing to draw.")
    written = []
    revisions = Counter(where[:3] for where in groups)
    for (suite, digest, task, revision), group in groups.items():
        data = f" data {digest_of(revision)[:8]}" if revisions[suite, digest, task] > 1 else ""
        curves = eps_curves(group)
        title = f"{task}{data} on {suite}, {len(group[0].samples)} samples"
        figures = {"eps": _eps_figure(curves, title)} if curves else {}
        figures["passes"] = _passes_figure(group, title)
        for what, figure in figures.items():
            written.append(folder / f"{slug(suite)}-{digest[:8]}--{slug(task + data)}--{what}.png")
            _save(figure, written[-1])
    return written


def _order(record: Record) -> tuple[str, str, str, Fraction, str]:
    threat = record.threat
    eps = Fraction(threat.eps)
    return record.model.name, threat.attack, threat.norm, eps, threat.surface


def _names(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """The display names of models; of models that share a name, with the digest of the weights."""
    models = sorted({(record.model.name, record.model.digest) for record in records})
    shared = Counter(name for name, _ in models)
    return {
        (name, digest): f"{name} ({digest[:8]})" if shared[name] > 1 else name
        for name, digest in models
    }


def _eps_figure(curves: Mapping[str, Mapping[str, Sequence[Point]]], title: str) -> Figure:
    figure, panels = _panels(list(curves), width=5.5, height=4)
    styles = _styles(model for models in curves.values() for model in models)
    for axes, models in zip(panels, curves.values(), strict=True):
        for model, points in models.items():
            radii = [float(Fraction(point.eps)) for point in points]
            axes.plot(radii, [100 * p.accuracy for p in points], marker="o", **styles[model])
            bounds = zip(*(point.interval for point in points), strict=True)
            low, high = ([100 * bound for bound in side] for side in bounds)
            axes.fill_between(radii, low, high, color=styles[model]["color"], alpha=0.13, lw=0)
        _label_radii(axes, {point.eps for points in models.values() for point in points})
        axes.set_xlabel("eps (at 0: clean accuracy); bands: Wilson's 95% interval")
    for axes in panels[:: _columns(len(panels))]:
        axes.set_ylabel("robust accuracy, %")
    _title_and_legend(figure, panels, title)
    return figure


def _label_radii(axes: Axes, radii: Iterable[str]) -> None:
    """Ticks are exact fractions; ticks that would overlap are left out, but never the largest."""
    ordered = sorted(radii, key=Fraction)
    gap = Fraction(ordered[-1]) / 10
    kept = [ordered[-1]]
    for eps in ordered[:-1]:
        if all(abs(Fraction(eps) - Fraction(other)) >= gap for other in kept):
            kept.append(eps)
    axes.set_xticks([float(Fraction(eps)) for eps in kept], kept)


def _passes_figure(records: Sequence[Record], title: str) -> Figure:
    models: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        models[record.model.name].append(record)
    figure, panels = _panels(list(models), width=4.6, height=3.4)
    styles = _styles(record.threat.name for record in records)
    # A logarithmic axis has no zero: 0 passes are drawn at half the passes of the first break.
    start = max(1, min(map(_first_break, records)) / 2)
    for axes, group in zip(panels, models.values(), strict=True):
        for number, record in enumerate(group):
            points = robust_after(record)
            passes = [max(p, start) for p, _ in points]
            shares = [100 * share for _, share in points]
            style = styles[record.threat.name]
            # Each line is thinner than the one before, so that no line hides another.
            width = 1.2 + 2 * (len(group) - number - 1) / len(group)
            axes.plot(passes, shares, drawstyle="steps-post", linewidth=width, **style)
            axes.plot(passes[-1], shares[-1], "o", markersize=4 + width, color=style["color"])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    columns = _columns(len(panels))
    for axes in panels[-columns:]:
        axes.set_xlabel("passes per sample (forward + backward)")
    for axes in panels[::columns]:
        axes.set_ylabel("samples still robust, %")
    _title_and_legend(figure, panels, title)
    return figure


def _first_break(record: Record) -> float:
    spent = (s.forward + s.backward for s in record.samples if s.broken_by is not None)
    return min(spent, default=math.inf)


def _columns(panels: int) -> int:
    return min(panels, 4 if panels > 6 else 3)


def _panels(titles: Sequence[str], *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A grid of panels that share an axis in percent, with room for a legend on the right."""
    columns = _columns(len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(columns * width + 2.5, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    every: list[Axes] = list(grid.flat)
    for axes in every[len(titles) :]:
        axes.set_axis_off()
    panels = every[: len(titles)]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(_label(title), fontsize=10)
        axes.set_ylim(-2, 102)
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
    return figure, panels


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A line style per name: ten colours, then the same colours dashed, and so on."""
    dashes = ("-", "--", ":", "-.")
    return {
        name: {
            "color": f"C{number % 10}",
            "linestyle": dashes[number // 10 % len(dashes)],
            "label": _label(name),
            "markersize": 4,
        }
        for number, name in enumerate(dict.fromkeys(names))
    }


def _title_and_legend(figure: Figure, panels: Iterable[Axes], title: str) -> None:
    """A title above the panels, and one legend for all panels to their right, below the title."""
    lines = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    # A legend at the height of the title would cover it, as would one that fills the figure.
    figure.set_figheight(max(figure.get_figheight(), 0.19 * len(lines) + 1.5))
    figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=8)
    wrapped = textwrap.wrap(_label(title, longest=120), int(10 * figure.get_figwidth()))
    figure.suptitle("\n".join(wrapped), x=0.01, ha="left")


def _label(text: str, *, longest: int = _LONGEST) -> str:
    """Text from a record in a figure: one line, only the end of a long text, and no formulas."""
    line = " ".join(printable(text).split())
    if len(line) > longest:
        line = f"...{line[3 - longest :]}"
    # Matplotlib leaves labels that begin with an underscore out of legends.
    return line.lstrip("_").replace("$", r"\$") or "-"


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_atomically(path, picture.getvalue())
