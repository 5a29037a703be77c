"""The study ``backbones``: MMT-ARD against one robust teacher on four kinds of students.

Figure 1 of the paper (arXiv 2511.17448) compares them on RN50, RN101, ViT-B-32 and ViT-B-32 with
LoRA. Here the students are small ones of the digits world.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from mmtard_bench.files import write_atomically
from mmtard_bench.train.figures import save
from mmtard_bench.train.recipe import Recipe
from mmtard_bench.train.study.report import (
    Scores,
    data_of,
    mean_and_deviation,
    named,
    points,
    tasks_of,
    warning,
    write_students,
)
from mmtard_bench.train.study.statistics import (
    METRICS,
    Score,
    Study,
    Variant,
    paired_difference,
    verdicts,
)

METHODS = ("ard", "mmt-ard")

STUDENTS: dict[str, tuple[str, ...]] = {
    "residual": ("student=tiny-clip-small",),
    "residual-deep": ("student=tiny-clip-deep",),
    "transformer": ("student=tiny-vit",),
    "transformer-lora": ("student=tiny-vit", "lora.rank=16", "lora.alpha=16", "lora.dropout=0.1"),
}
"""The students, each with its changes to the recipes of ``digits/``."""

RATES = {
    ("transformer", "ard"): "2e-3",
    ("transformer", "mmt-ard"): "5e-3",
    ("transformer-lora", "ard"): "1e-2",
    ("transformer-lora", "mmt-ard"): "1e-2",
}
"""Learning rates of (student, method), chosen on validation images; others have their recipe's."""


def _changes(student: str, method: str) -> tuple[str, ...]:
    rate = RATES.get((student, method))
    return STUDENTS[student] + (() if rate is None else (f"learning_rate={rate}",))


BACKBONES = tuple(
    Variant(f"{student}-{method}", method, _changes(student, method))
    for student in STUDENTS
    for method in METHODS
)


def write_backbones(
    study: Study,
    scores: Scores,
    *,
    seeds: int,
    recipes: Mapping[str, Recipe],
    command: str,
    folder: Path,
) -> Path:
    """Write README.md, backbones.png and students.csv; returns the page's path."""
    grouped = {label: [scores[label, seed] for seed in range(seeds)] for label in recipes}
    _draw(study, grouped, folder / "backbones.png")
    write_students(folder / "students.csv", grouped)
    settings = "; ".join(
        f"`{variant.label}` {', '.join(f'`{change}`' for change in variant.changes)}"
        for variant in BACKBONES
    )
    page = f"""# Backbones: {len(STUDENTS)} students, {seeds} seeds

`{command}` writes this page. Figure 1 of the paper (arXiv 2511.17448) compares four pairs of
teachers and students; these are four small students under the same two teachers. Accuracies are in
percent, as mean ± standard deviation over seeds.

- clean, robust: `{study.robust_suite}` ({data_of(study.robust_suite)}).
- unseen: zero-shot accuracy without attack, on combinations that training never shows
  (`{study.unseen_suite}`: {tasks_of(study.unseen_suite)}).
- parameters: how many are trained.
- The rows with a difference are `mmt-ard` minus `{study.baseline}` in points, paired by seed and by
  sample; the 95% interval in brackets covers other seeds and other samples.

{warning(grouped)}{_table(study, grouped)}

The recipes are `digits/{study.baseline}` and `digits/mmt-ard` with these changes: {settings}.
`digits/mmt-ard` distils at temperature 2, `digits/{study.baseline}` at temperature 1, as its
authors do. Learning rates were chosen on validation images with seed 0, for each method.

![clean and robust accuracy of each student](backbones.png)

Every student: [students.csv](students.csv).
"""
    write_atomically(folder / "README.md", page)
    return folder / "README.md"


def _table(study: Study, grouped: Mapping[str, list[Score]]) -> str:
    rows: list[list[str]] = []
    for student in STUDENTS:
        pair = [(m, grouped.get(f"{student}-{m}")) for m in study.methods]
        found = [(method, scores) for method, scores in pair if scores is not None]
        for method, scores in found:
            cells = [student, named(method, scores), f"{scores[0].parameters:,}"]
            rows.append(cells + [mean_and_deviation(scores, metric) for metric in METRICS])
        if len(found) == 2:
            (_, base), (_, ours) = found
            gaps = [
                paired_difference(verdicts(ours, metric), verdicts(base, metric))
                for metric in METRICS
            ]
            rows.append([student, "difference", "", *(points(gap) for gap in gaps)])
    headers = ["student", "method", "parameters", *METRICS]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _draw(study: Study, grouped: Mapping[str, list[Score]], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 3))
    for side, metric in zip(axes, METRICS, strict=True):
        for number, method in enumerate(study.methods):
            for place, student in enumerate(STUDENTS):
                scores = grouped.get(f"{student}-{method}")
                if scores is None:
                    continue
                seeds = 100 * verdicts(scores, metric).mean(1)
                x = place + (number - (len(study.methods) - 1) / 2) * 0.38
                label = method if place == 0 else None
                side.bar(x, seeds.mean(), 0.36, color=f"C{number}", alpha=0.6, label=label)
                side.scatter([x] * len(seeds), seeds, s=12, color="black", zorder=3)
        side.set_title(f"{metric} accuracy, %", fontsize=10)
        names = [name.replace("-", "\n") for name in STUDENTS]
        side.set_xticks(range(len(STUDENTS)), names, fontsize=8)
        side.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("bars: mean over seeds; dots: seeds", fontsize=10)
    save(figure, path)
