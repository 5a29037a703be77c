"""The report of a study: a page of markdown with tables, two plots, and all figures as CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from mmtard_bench.files import write_atomically
from mmtard_bench.tasks.suites import load_suite
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

PAPER = {
    "robust": ("+4.32", "ImageNet, linf 2/255"),
    "unseen": ("+3.5", "zero-shot benchmarks, clean"),
    "efficiency": ("2.3x", "not stated"),
}
"""MMT-ARD against its single-teacher baseline, ViT-B-32, with the data of each figure.

Figures and data come from the abstract of arXiv 2511.17448, the radius from the authors' code.
"""

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

    ``recipes`` holds the recipe of each method; ``command`` is the command that runs the study.
    """
    grouped = {m: [scores[m, seed] for seed in range(seeds)] for m in study.methods}
    _draw_curves(study, grouped, folder / "curves.png")
    _draw_trade_off(study, grouped, folder / "trade-off.png")
    write_students(folder / "students.csv", grouped)
    write_atomically(folder / "README.md", _page(study, grouped, recipes, command))
    return folder / "README.md"


def _page(
    study: Study, grouped: Mapping[str, list[Score]], recipes: Mapping[str, Recipe], command: str
) -> str:
    seeds = len(grouped[study.baseline])
    counted = f"{len(study.methods)} methods, {seeds} seed{'s' if seeds > 1 else ''}"
    return f"""# {study.family}: {counted}

`{command}` writes this page. All students of a seed start from the same weights and see the same
images in the same order. Accuracies are in percent, as mean ± standard deviation over seeds.

- clean, robust: accuracy without attack, and under attack (`{study.robust_suite}`:
  {data_of(study.robust_suite)}).
- unseen: zero-shot accuracy without attack, on combinations that training never shows
  (`{study.unseen_suite}`: {tasks_of(study.unseen_suite)}).
- metric - {study.baseline}: difference to `{study.baseline}` in points, paired by seed and by
  sample. The 95% interval in brackets covers other seeds and other samples.
- steps: training steps until the mean robust validation accuracy reaches the final one of
  `{study.baseline}`; in brackets, how many times fewer steps than `{study.baseline}` needs.

{warning(grouped)}{_table(study, grouped)}

Validation runs the recipe's own PGD on held-out renderings of the training data. PGD is weaker than
AutoAttack, so validation compares the methods while they learn and does not measure robustness. A
method whose validation accuracy never reaches that of `{study.baseline}` may still be the more
robust one.

{_claims(study, grouped)}

Settings of each method: {_settings(recipes)}.

![robust validation accuracy while training](curves.png)

![clean against robust accuracy](trade-off.png)

Every student: [students.csv](students.csv).
"""


def tasks_of(suite: str) -> str:
    """The tasks of a suite and its sample count."""
    loaded = load_suite(suite)
    return f"{', '.join(task.name for task, _ in loaded.plan)}, {loaded.n} samples"


def data_of(suite: str) -> str:
    """The tasks of a suite, its sample count and its threat models."""
    return f"{tasks_of(suite)}, {', '.join(threat.name for threat in load_suite(suite).threats)}"


def warning(grouped: Mapping[str, list[Score]]) -> str:
    """A paragraph that names the students whose clean accuracy is at chance; "" if none is."""
    students = [
        f"`{method}` seed {seed}"
        for method, scores in grouped.items()
        for seed, score in enumerate(scores)
        if score.at_chance
    ]
    if not students:
        return ""
    return (
        "**Warning.** The clean accuracy of these students is not above chance, so their robust "
        "accuracy, and every difference to or from them, says nothing about robustness: "
        f"{', '.join(students)}.\n\n"
    )


def named(method: str, scores: Sequence[Score]) -> str:
    """A method's name for a table, which says if a student is at chance."""
    return f"`{method}`{' (at chance)' * any(score.at_chance for score in scores)}"


def _table(study: Study, grouped: Mapping[str, list[Score]]) -> str:
    rows = []
    for method, scores in grouped.items():
        cells = [named(method, scores)]
        cells += [mean_and_deviation(scores, metric) for metric in METRICS]
        if method == study.baseline:
            cells += ["", "", ""]
        else:
            cells += [points(_gap(study, grouped, method, metric)) for metric in METRICS]
        cells.append(_steps(study, grouped, method))
        rows.append(cells)
    headers = ["method", *METRICS, *(f"{m} - {study.baseline}" for m in METRICS), "steps"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _claims(study: Study, grouped: Mapping[str, list[Score]]) -> str:
    if "mmt-ard" not in grouped:
        return ""
    ours, base = (named(name, grouped[name]) for name in ("mmt-ard", study.baseline))
    robust, unseen = (points(_gap(study, grouped, "mmt-ard", of)) for of in ("robust", "unseen"))
    clean = f"{tasks_of(study.unseen_suite)}, clean"
    validation = "robust validation accuracy"
    rows = [
        ["robust accuracy", *PAPER["robust"], robust, data_of(study.robust_suite)],
        ["zero-shot accuracy", *PAPER["unseen"], unseen, clean],
        ["training efficiency", *PAPER["efficiency"], _efficiency(study, grouped), validation],
    ]
    where = ["paper: ViT-B-32", "data of the paper", "here", "data here"]
    headers = [f"{ours} against {base}", *where]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return (
        "The three claims of the paper (arXiv 2511.17448, abstract) beside the results of these "
        f"small models:\n\n{table}\n\nThe abstract names ImageNet and zero-shot benchmarks, but no "
        "radius; linf 2/255 is the radius of the authors' code. Model, data and radius differ "
        "here: compare the signs, not the sizes."
    )


def _settings(recipes: Mapping[str, Recipe]) -> str:
    own = {m: {"learning_rate": r.learning_rate, **r.options} for m, r in recipes.items()}
    return "; ".join(
        f"`{method}` {', '.join(f'{key} = {value}' for key, value in table.items())}"
        for method, table in own.items()
    )


def _gap(study: Study, grouped: Mapping[str, list[Score]], method: str, metric: str) -> Difference:
    ours, base = (verdicts(grouped[name], metric) for name in (method, study.baseline))
    return paired_difference(ours, base)


def points(gap: Difference) -> str:
    """A difference in points with its interval, if it has one."""
    if math.isinf(gap.low):
        return f"{100 * gap.mean:+.1f}"
    return f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def mean_and_deviation(scores: Sequence[Score], metric: str) -> str:
    """The mean accuracy over seeds and its standard deviation, in percent."""
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
            axes.plot(
                curve[:, column],
                100 * curve[:, 2],
                style,
                marker="o",  # a curve of one point has no line
                markersize=3,
                color=f"C{number}",
                label=method,
            )
            axes.fill_between(curve[:, column], low, high, color=f"C{number}", alpha=0.12)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("robust validation accuracy, %")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("lines: mean over seeds; bands: lowest to highest seed", fontsize=10)
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


def write_students(path: Path, grouped: Mapping[str, list[Score]]) -> None:
    """Write every student's accuracies and seconds of training as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *METRICS, "seconds"])
    for method, scores in grouped.items():
        for seed, score in enumerate(scores):
            shares = [f"{verdicts([score], metric).mean():.4f}" for metric in METRICS]
            writer.writerow([method, seed, *shares, f"{score.curve[-1][1]:.1f}"])
    write_atomically(path, text.getvalue())
