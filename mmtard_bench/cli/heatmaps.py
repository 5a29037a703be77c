"""The command that shows where a student and its teachers look: heatmaps."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from mmtard_bench.cli.common import AGAIN, Commands, output, positive, seed
from mmtard_bench.text import printable, slug
from mmtard_bench.types import Eps, ThreatModel

if TYPE_CHECKING:
    from mmtard_bench.evaluation.heatmaps import Comparison, Mean

Figures = dict[str, dict[str, "Mean"]]


def add(commands: Commands) -> None:
    """Add heatmaps."""
    command = commands.add_parser(
        "heatmaps",
        help="show where a student and its teachers look, and compare their maps",
        description=_HEATMAPS,
    )
    command.add_argument(
        "--student", required=True, metavar="SPEC", help="the student, as --model of eval"
    )
    command.add_argument(
        "--teacher",
        required=True,
        action="append",
        metavar="SPEC",
        help="a teacher; give the option once for each",
    )
    command.add_argument(
        "--task", default="digits/digit", help="a task, or a data spec (default: digits/digit)"
    )
    command.add_argument("--n", type=positive, default=100, help="samples (default: 100)")
    command.add_argument("--samples", dest="n", type=positive, help=argparse.SUPPRESS)
    command.add_argument(
        "--shown", type=positive, default=6, help="samples in the picture (default: 6)"
    )
    command.add_argument(
        "--threat", default="pgd-20", help="the attack on the student (default: pgd-20)"
    )
    command.add_argument(
        "--eps",
        default="8/255",
        help="the radius as a fraction for pixels in [0, 1] (default: 8/255)",
    )
    command.add_argument("--norm", choices=("linf", "l2"), default="linf", help="default: linf")
    command.add_argument(
        "--seed", type=seed, default=0, help="seed of samples and attack (default: 0)"
    )
    command.add_argument(
        "--out",
        type=output,
        help="directory for heatmaps.png and heatmaps.json (default: runs/heatmaps-STUDENT)",
    )
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    command.set_defaults(run=_heatmaps, kept=AGAIN)


_HEATMAPS = (
    "Show where a student and its teachers look for the true class, on clean images and on "
    "adversarial images of the student, and compare their maps by rank correlation. "
    "docs/how-to/heatmaps.md says how to read it."
)


def _heatmaps(arguments: argparse.Namespace) -> int:
    from mmtard_bench.models.specs import require_form

    # Before the slow imports: a slip in a name or number should not take seconds to hear of.
    for spec in (arguments.student, *arguments.teacher):
        require_form(spec)
    norm = arguments.norm
    threat = ThreatModel(arguments.threat, norm, Eps.parse(arguments.eps, norm=norm))

    from mmtard_bench.evaluation.device import find_device
    from mmtard_bench.evaluation.heatmaps import compare_looks, draw, figures_of
    from mmtard_bench.files import write_atomically
    from mmtard_bench.leaderboard.entries.folder import require_outside
    from mmtard_bench.models.loading import load_model
    from mmtard_bench.tasks.samples import find_task, load_task

    device = find_device(arguments.device)
    data = load_task(find_task(arguments.task), n=arguments.n, seed=arguments.seed)
    models = [load_model(spec) for spec in (arguments.student, *arguments.teacher)]
    found = compare_looks(models, data, threat, seed=arguments.seed, device=device)
    figures = figures_of(found)
    out = arguments.out or require_outside(Path("runs") / f"heatmaps-{slug(found.student.name)}")
    draw(found, out / "heatmaps.png", most=arguments.shown)
    write_atomically(out / "heatmaps.json", _json(found, figures, threat, arguments.seed))
    print(printable(_text(found, figures, threat)))
    print(f"written to {out}/heatmaps.png and heatmaps.json")
    return 0


def _json(found: "Comparison", figures: Figures, threat: ThreatModel, seed: int) -> str:
    def plain(value: float) -> float | None:
        return None if math.isnan(value) else value  # JSON has no NaN

    body = {
        "task": found.data.task.name,
        "threat": threat.name,
        "seed": seed,
        "n": len(found.data.labels),
        "models": [{"name": looks.name, "layer": looks.layer} for looks in found.models],
        "samples": [
            {
                "id": sample,
                "predicted": {
                    looks.name: {v: int(p[row]) for v, p in looks.predicted.items()}
                    for looks in found.models
                },
            }
            for row, sample in enumerate(found.data.manifest.ids)
        ],
        "figures": {
            name: {
                view: {key: plain(value) for key, value in asdict(mean).items()}
                for view, mean in by_view.items()
            }
            for name, by_view in figures.items()
        },
    }
    return json.dumps(body, indent=1) + "\n"


def _text(found: "Comparison", figures: Figures, threat: ThreatModel) -> str:
    from mmtard_bench.evaluation.heatmaps import VIEWS

    def cell(mean: "Mean | None") -> str:
        if mean is None:
            return ""
        left_out = f" ({mean.left_out} left out)" if mean.left_out else ""
        return f"{mean.mean:.2f} [{mean.low:.2f}, {mean.high:.2f}]{left_out}"

    rows = [[name, *(cell(by.get(view)) for view in VIEWS)] for name, by in figures.items()]
    table = tabulate(rows, headers=["", *VIEWS], disable_numparse=True)
    layers = ", ".join(f"{looks.name} ({looks.layer})" for looks in found.models)
    return (
        f"{len(found.data.labels)} samples of {found.data.task.name}; adversarial images: "
        f"{threat.name}, on {found.student.name}\nMaps: {layers}\n\n{table}\n\n"
        f"{_answer(found, figures)}"
    )


def _answer(found: "Comparison", figures: Figures) -> str:
    """From which of two teachers the student took where to look, and whether it keeps it."""
    student, teachers = found.student.name, [looks.name for looks in found.models[1:]]
    kept = figures[f"{student}, clean with adversarial"]["adversarial"]
    under_attack = (
        f"Under attack, its maps correlate with those of the clean images by {kept.mean:.2f}."
    )
    if len(teachers) != 2:
        return under_attack
    first, second = teachers
    alike = {name: figures[f"{student} with {name}"]["clean"] for name in teachers}
    chance = {
        name: figures[f"{student} with {name} on another image"]["clean"] for name in teachers
    }
    if not any(alike[name].low > chance[name].high for name in teachers):
        return (
            f"The maps of {student} have no more in common with those of its teachers than with "
            f"their maps of other images. {under_attack}"
        )
    gap = figures[f"{first} minus {second}"]["clean"]
    if not (gap.low > 0 or gap.high < 0):
        return (
            f"The maps of {student} are as close to those of {first} as to those of {second}: the "
            f"difference of the correlations, {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}], "
            f"is not significant. {under_attack}"
        )
    nearer, other = (first, second) if gap.mean > 0 else (second, first)
    return (
        f"The maps of {student} are closer to those of {nearer} than to those of {other}: "
        f"correlations of {alike[nearer].mean:.2f} and {alike[other].mean:.2f}. {under_attack}"
    )
