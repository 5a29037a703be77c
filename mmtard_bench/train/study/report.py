"""The report of a study: one page of markdown with its tables, two plots, every figure as CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from mmtard_bench.files import write_atomically
from mmtard_bench.train.figures import save
from mmtard_bench.train.recipe import Recipe
from mmtard_bench.train.study.statistics import (
    METRICS,
    Difference,
    Score,
    Study,
    cost_of,
    mean_curve,
    paired_difference,
    times_cheaper,
    verdicts,
)

PAPER = {"robust": "+4.32", "unseen": "+3.5", "efficiency": "2.3x"}
"""MMT-ARD against its single-teacher baseline, ViT-B-32 (arXiv 2511.17448, abstract)."""

Scores = Mapping[tuple[str, int], Score]


def write_report(
    study: Study,
    scores: Scores,
    *,
    seeds: int,
    recipes: Mapping[str, Recipe],
    command: str,
    folder: Path,
) -> Path:
    """Write README.md, curves.png, trade-off.png and students.csv; returns the page's path.

    ``recipes`` are those of the methods; ``command`` is what the page says it was written by.
    """
    grouped = {m: [scores[m, seed] for seed in range(seeds)] for m in study.methods}
    _draw_curves(study, grouped, folder / "curves.png")
    _draw_trade_off(study, grouped, folder / "trade-off.png")
    write_atomically(folder / "students.csv", _csv(grouped))
    counted = f"{len(study.methods)} methods, {seeds} seed{'s' if seeds > 1 else ''}"
    page = f"""# {study.family}: {counted}

Written by `{command}`. All students start from
the same weights and see the same images in the same order for a seed; accuracies are in percent.
Robust is AutoAttack (`{study.robust_suite}`), unseen is zero-shot accuracy on combinations that
training never shows (`{study.unseen_suite}`). Mean and standard deviation over seeds.

{_table(study, grouped)}

Differences to `{study.baseline}` are in points, paired by seed and by sample, with a 95% interval
that covers other seeds and other samples. Steps: training steps until the mean robust validation
accuracy reaches the final one of `{study.baseline}`; how many times fewer in brackets. Validation
is the recipe's own PGD, a weaker attack than AutoAttack, on held-out renderings of what was trained
on: it compares methods while they learn, it does not measure their robustness, and a method that
never gets there by it may still be the more robust one under AutoAttack.

{_claims(study, grouped)}

What the recipes set for each method: {_settings(recipes)}.

![robust validation accuracy while training](curves.png)

![clean against robust accuracy](trade-off.png)

Every student: [students.csv](students.csv).
"""
    write_atomically(folder / "README.md", page)
    return folder / "README.md"


def _table(study: Study, grouped: Mapping[str, list[Score]]) -> str:
    rows = []
    for method, scores in grouped.items():
        cells = [f"`{method}`"]
        cells += [_mean_and_deviation(scores, metric) for metric in METRICS]
        if method == study.baseline:
            cells += ["", "", ""]
        else:
            cells += [_points(_gap(study, grouped, method, metric)) for metric in METRICS]
        cells.append(_steps(study, grouped, method))
        rows.append(cells)
    headers = ["method", *METRICS, *(f"{m} - {study.baseline}" for m in METRICS), "steps"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _claims(study: Study, grouped: Mapping[str, list[Score]]) -> str:
    if "mmt-ard" not in grouped:
        return ""
    rows = [
        ["robust accuracy", PAPER["robust"], _points(_gap(study, grouped, "mmt-ard", "robust"))],
        ["zero-shot accuracy", PAPER["unseen"], _points(_gap(study, grouped, "mmt-ard", "unseen"))],
        ["training efficiency", PAPER["efficiency"], _efficiency(study, grouped)],
    ]
    headers = [f"`mmt-ard` against `{study.baseline}`", "paper (ViT-B-32)", "here"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return f"The paper's three claims beside these small models on a small world:\n\n{table}"


def _settings(recipes: Mapping[str, Recipe]) -> str:
    own = {m: {"learning_rate": r.learning_rate, **r.options} for m, r in recipes.items()}
    return "; ".join(
        f"`{method}` {', '.join(f'{key} = {value}' for key, value in table.items())}"
        for method, table in own.items()
    )


def _gap(study: Study, grouped: Mapping[str, list[Score]], method: str, metric: str) -> Difference:
    ours, base = (verdicts(grouped[name], metric) for name in (method, study.baseline))
    return paired_difference(ours, base)


def _points(gap: Difference) -> str:
    if math.isinf(gap.low):
        return f"{100 * gap.mean:+.1f}"
    return f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def _mean_and_deviation(scores: Sequence[Score], metric: str) -> str:
    seeds = 100 * verdicts(scores, metric).mean(1)
    if len(seeds) < 2:
        return f"{seeds[0]:.1f}"
    return f"{seeds.mean():.1f} ± {seeds.std(ddof=1):.1f}"


def _steps(study: Study, grouped: Mapping[str, list[Score]], method: str) -> str:
    ours, base = mean_curve(grouped[method]), mean_curve(grouped[study.baseline])
    steps, _ = cost_of(ours, float(base[-1, 2]))
    ratio, _ = times_cheaper(ours, base)
    return f"{steps:.0f} ({ratio:.1f}x)" if ratio else "never"


def _efficiency(study: Study, grouped: Mapping[str, list[Score]]) -> str:
    pairs = list(zip(grouped["mmt-ard"], grouped[study.baseline], strict=True))
    steps, seconds = times_cheaper(*(mean_curve(scores) for scores in zip(*pairs, strict=True)))
    if not steps:
        return "never reached"
    each = [times_cheaper(mean_curve([ours]), mean_curve([base]))[0] for ours, base in pairs]
    return (
        f"{steps:.1f}x in steps (seed by seed {min(each):.1f}x to {max(each):.1f}x), "
        f"{seconds:.1f}x in seconds"
    )


def _draw_curves(study: Study, grouped: Mapping[str, list[Score]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("step", "seconds of training"), strict=True
    ):
        for number, (method, scores) in enumerate(grouped.items()):
            curve = mean_curve(scores)
            every = [[100 * point[2] for point in score.curve] for score in scores]
            low, high = ([f(points) for points in zip(*every, strict=True)] for f in (min, max))
            style = "--" if method == study.baseline else "-"
            axes.plot(curve[:, column], 100 * curve[:, 2], style, color=f"C{number}", label=method)
            axes.fill_between(curve[:, column], low, high, color=f"C{number}", alpha=0.12)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("robust validation accuracy, %")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("mean over seeds, smallest to largest", fontsize=10)
    save(figure, path)


def _draw_trade_off(study: Study, grouped: Mapping[str, list[Score]], path: Path) -> None:
    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, (method, scores) in enumerate(grouped.items()):
        clean, robust = (100 * verdicts(scores, metric).mean(1) for metric in ("clean", "robust"))
        colour, marker = f"C{number}", "s" if method == study.baseline else "o"
        axes.scatter(clean, robust, s=14, color=colour, alpha=0.45)
        axes.scatter(clean.mean(), robust.mean(), s=80, color=colour, marker=marker, label=method)
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("accuracy under AutoAttack, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def _csv(grouped: Mapping[str, list[Score]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *METRICS, "seconds"])
    for method, scores in grouped.items():
        for seed, score in enumerate(scores):
            shares = [f"{verdicts([score], metric).mean():.4f}" for metric in METRICS]
            writer.writerow([method, seed, *shares, f"{score.curve[-1][1]:.1f}"])
    return text.getvalue()
