"""The study ``frontier``: how each method trades clean against robust accuracy.

A point says little, since every method can give up clean accuracy for robustness. Each method is
therefore trained with several radii of its inner attack, and ``mmt-ard`` with several fixed shares
of the robust teacher as well; the best of these trade-offs are its frontier.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from tabulate import tabulate

from mmtard_bench.files import write_atomically
from mmtard_bench.train.figures import save
from mmtard_bench.train.recipe import Recipe
from mmtard_bench.train.study.report import (
    Scores,
    data_of,
    mean_and_deviation,
    points,
    warning,
    write_students,
)
from mmtard_bench.train.study.statistics import Difference, Score, Study, Variant, verdicts

METHODS = ("tecoa", "fare", "pmg-aft", "ard", "mtard", "mmt-ard")
RADII = (2, 4, 8, 12)
"""Radii of the inner attack in units of 1/255."""
SHARES = (0.3, 0.8, 0.95)
"""The robust teacher's fixed shares in ``mmt-ard`` without its gate, at radius 8/255."""
GRID = 50
"""Clean accuracies at which two frontiers are compared."""

Points = NDArray[np.float64]


def _radius(eps: int) -> tuple[str, str]:
    # The recipes take three steps of 5/255 at 8/255; the step scales with the radius.
    return f"attack.eps={eps}/255", f"attack.step_size={5 * eps}/{8 * 255}"


def _variants() -> tuple[Variant, ...]:
    found = []
    for method in METHODS:
        # One temperature for the three that distil: mmt-ard's recipe has it.
        heat = ("options.temperature=2.0",) if method in ("ard", "mtard") else ()
        found += [Variant(f"{method}-eps{eps}", method, (*_radius(eps), *heat)) for eps in RADII]
    for share in SHARES:
        changes = ("options.gate=false", f"options.share={share}")
        found.append(Variant(f"mmt-ard-share{share}", "mmt-ard", changes))
    return tuple(found)


FRONTIER = _variants()
METHOD_OF = {variant.label: variant.method for variant in FRONTIER}


def frontier(students: Points) -> Points:
    """The students that no other dominates, (M, 2) of (K, 2): clean and robust accuracy.

    They are ordered by rising clean accuracy, so that robust accuracy falls.
    """
    ordered = students[np.lexsort((-students[:, 1], -students[:, 0]))]
    best, kept = -math.inf, []
    for clean, robust in ordered:
        if robust > best:
            best = robust
            kept.append((clean, robust))
    return np.array(kept[::-1])


def gap(ours: Points, theirs: Points) -> float:
    """The mean difference in robust accuracy of two frontiers at equal clean accuracy.

    ``ours`` and ``theirs`` are students, (K, 2) each. Between its students a frontier is linear.
    The mean is over the range of clean accuracies that both cover; NaN if there is none.
    """
    one, other = frontier(ours), frontier(theirs)
    low, high = max(one[0, 0], other[0, 0]), min(one[-1, 0], other[-1, 0])
    if low > high:
        return math.nan
    places = np.linspace(low, high, GRID)
    apart = np.interp(places, *one.T) - np.interp(places, *other.T)
    return float(apart.mean())


def students_of(grouped: Mapping[str, list[Score]], method: str, seed: int) -> Points:
    """The clean and robust accuracies of a method's students of one seed, (K, 2)."""
    scores = [s[seed] for label, s in grouped.items() if METHOD_OF[label] == method]
    return np.array(
        [[verdicts([s], metric).mean() for metric in ("clean", "robust")] for s in scores]
    )


def gap_over_seeds(gaps: Sequence[float]) -> Difference:
    """The mean of the seeds' gaps with a 95% t interval, infinite for one seed; NaN if any is."""
    mean = float(np.mean(gaps))
    if len(gaps) < 2:
        return Difference(mean, -math.inf, math.inf)
    deviation = float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps))
    reach = float(stats.t.ppf(0.975, len(gaps) - 1)) * deviation
    return Difference(mean, mean - reach, mean + reach)


def write_frontier(
    study: Study,
    scores: Scores,
    *,
    seeds: int,
    recipes: Mapping[str, Recipe],
    command: str,
    folder: Path,
) -> Path:
    """Write README.md, frontier.png and students.csv; returns the page's path."""
    grouped = {label: [scores[label, seed] for seed in range(seeds)] for label in recipes}
    _draw(study, grouped, folder / "frontier.png")
    write_students(folder / "students.csv", grouped)
    page = f"""# Frontier: clean against robust accuracy, {seeds} seeds

`{command}` writes this page. Methods trade clean against robust accuracy, so one student of each
says little. Here every method is trained with several radii of its inner attack (eps, in units of
1/255), and `mmt-ard` also with fixed shares of the robust teacher instead of its gate. `ard`,
`mtard` and `mmt-ard` distil at temperature 2. Robust accuracy: {data_of(study.robust_suite)}.
Accuracies are in percent, as mean ± standard deviation over seeds.

{warning(grouped)}{_table(grouped)}

The *frontier* of a method has those of its students that no other one of it beats in both
accuracies; between students it is a straight line. The next table compares the frontier of
`mmt-ard` with the others at equal clean accuracy: the mean difference in robust accuracy, in
points, over the clean accuracies that both cover. The 95% interval (t) covers other seeds, not
other test samples.

{_gaps(study, grouped, seeds)}

![clean against robust accuracy of every method](frontier.png)

Every student: [students.csv](students.csv).
"""
    write_atomically(folder / "README.md", page)
    return folder / "README.md"


def _table(grouped: Mapping[str, list[Score]]) -> str:
    metrics = ("clean", "robust", "unseen")
    rows = [
        [
            f"`{METHOD_OF[label]}`",
            label.removeprefix(f"{METHOD_OF[label]}-"),
            *(mean_and_deviation(scores, metric) for metric in metrics),
        ]
        for label, scores in grouped.items()
    ]
    headers = ["method", "setting", *metrics]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _gaps(study: Study, grouped: Mapping[str, list[Score]], seeds: int) -> str:
    rows = []
    for method in study.methods:
        if method == "mmt-ard" or "mmt-ard" not in study.methods:
            continue
        every = [
            gap(*(students_of(grouped, name, seed) for name in ("mmt-ard", method)))
            for seed in range(seeds)
        ]
        found = gap_over_seeds(every)
        rows.append([f"`{method}`", "no common range" if math.isnan(found.mean) else points(found)])
    headers = ["against", "`mmt-ard` at equal clean accuracy"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _draw(study: Study, grouped: Mapping[str, list[Score]], path: Path) -> None:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(study.methods):
        labels = [label for label in grouped if METHOD_OF[label] == method]
        means = 100 * np.array(
            [
                [verdicts(grouped[label], metric).mean() for metric in ("clean", "robust")]
                for label in labels
            ]
        )
        axes.scatter(means[:, 0], means[:, 1], s=22, color=f"C{number}")
        axes.plot(*frontier(means).T, color=f"C{number}", label=method)
        for label, (clean, robust) in zip(labels, means, strict=True):
            text = label.removeprefix(f"{method}-").removeprefix("eps")
            axes.annotate(
                text, (clean, robust), textcoords="offset points", xytext=(4, 3), fontsize=7
            )
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("accuracy under AutoAttack, %")
    axes.set_title("means over seeds; numbers: radius of the inner attack, 1/255", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)
