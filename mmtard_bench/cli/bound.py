"""The command that bounds a student's robust accuracy by its teachers': bound."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from mmtard_bench.cli.common import Commands, positive, seed
from mmtard_bench.text import printable
from mmtard_bench.types import Eps, ThreatModel

if TYPE_CHECKING:
    from mmtard_bench.evaluation.bound import Bound, Setting
    from mmtard_bench.records.statistics import Truths


def add(commands: Commands) -> None:
    """Add bound."""
    command = commands.add_parser(
        "bound",
        help="bound a student's robust accuracy by its teachers', and say why it loses",
        description=_BOUND,
    )
    command.add_argument("student", help="the student, as --model of the command eval")
    command.add_argument("--clean", required=True, metavar="SPEC", help="the clean teacher")
    command.add_argument("--robust", required=True, metavar="SPEC", help="the robust teacher")
    command.add_argument(
        "--eps", required=True, help="the radius as a fraction, such as 8/255, for pixels in [0, 1]"
    )
    command.add_argument("--norm", choices=("linf", "l2"), default="linf", help="default: linf")
    command.add_argument(
        "--task", default="digits/digit", help="a task, or a data spec (default: digits/digit)"
    )
    command.add_argument("--n", type=positive, default=200, help="samples (default: 200)")
    command.add_argument(
        "--share",
        type=_number,
        default=0.5,
        help="weight of the robust teacher in the mixture, from 0 to 1 (default: 0.5)",
    )
    command.add_argument(
        "--temperature",
        type=_number,
        default=1.0,
        help="divides the logits of all models (default: 1). The bound holds at every temperature; "
        "near 0 it is large and says nothing about the distance from the teachers",
    )
    command.add_argument(
        "--steps",
        type=positive,
        default=50,
        help="steps of each search on a certificate (default: 50)",
    )
    command.add_argument(
        "--restarts", type=positive, default=1, help="starts of each search (default: 1)"
    )
    command.add_argument(
        "--seed", type=seed, default=0, help="seed of samples and attacks (default: 0)"
    )
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    command.add_argument(
        "--json", action="store_true", help="print a JSON object, with the figures of each sample"
    )
    command.set_defaults(run=_bound)


_BOUND = (
    "Bound the robust accuracy of a student from below by the margin of its teachers' mixture and "
    "its distance from it. The bounds that are printed come from attacks, so each is an estimate "
    "from above of the true bound; docs/explanation/transfer-bound.md has the proof."
)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _bound(arguments: argparse.Namespace) -> int:
    from mmtard_bench.models.specs import require_form

    # Before the slow imports: a slip in a name or number should not take seconds to hear of.
    for spec in (arguments.student, arguments.clean, arguments.robust):
        require_form(spec)
    norm = arguments.norm
    threat = ThreatModel("apgd-pair", norm, Eps.parse(arguments.eps, norm=norm))

    from rich.console import Console

    from mmtard_bench.evaluation.bound import Setting, transfer_bound
    from mmtard_bench.evaluation.device import find_device
    from mmtard_bench.models.loading import load_model
    from mmtard_bench.tasks.samples import find_task, load_task

    setting = Setting(
        threat=threat,
        share=arguments.share,
        temperature=arguments.temperature,
        steps=arguments.steps,
        restarts=arguments.restarts,
        seed=arguments.seed,
    )
    device = find_device(arguments.device)
    data = load_task(find_task(arguments.task), n=arguments.n, seed=arguments.seed)
    student, clean, robust = map(load_model, (arguments.student, arguments.clean, arguments.robust))
    with Console(stderr=True, highlight=False).status("attack") as status:
        found = transfer_bound(
            student,
            clean=clean,
            robust=robust,
            data=data,
            setting=setting,
            device=device,
            report=lambda name: status.update(f"attack: {name}"),
        )
    names = {
        "student": student.name,
        "robust_teacher": robust.name,
        "clean_teacher": clean.name,
    }
    if arguments.json:
        body = {**names, "task": data.task.name, **_settings(setting), **_figures(found)}
        print(json.dumps(body, indent=1))
    else:
        print(printable(_text(found, names, setting, data.task.name)))
    return 0


def _settings(setting: "Setting") -> dict[str, Any]:
    threat = setting.threat
    return {
        "attack": threat.attack,
        "norm": threat.norm,
        "eps": str(threat.eps),
        "share": setting.share,
        "temperature": setting.temperature,
        "steps": setting.steps,
        "restarts": setting.restarts,
        "seed": setting.seed,
    }


def _figures(found: "Bound") -> dict[str, Any]:
    """The shares of samples, where the student loses, and the lowest values of each sample."""
    from mmtard_bench.evaluation.bound import JUDGED

    return {
        "n": len(found.ids),
        "clean": {name: float(found.right(name).mean()) for name in JUDGED},
        "robust": {name: float(found.robust(name).mean()) for name in JUDGED},
        "groups": [
            {"group": group, "robust": robust, "not_robust": lost}
            for group, robust, lost in _groups(found)
        ],
        "samples": [
            {"id": sample, **{name: float(found.lowest[name][row]) for name in JUDGED}}
            for row, sample in enumerate(found.ids)
        ],
    }


def _groups(found: "Bound") -> list[tuple[str, int, int]]:
    """Why samples are certified or not, and how often the student is robust there, or not.

    The certificate is the exact one, which no other statement in terms of KL can improve on.
    """
    certified, robust = found.robust("exact in KL"), found.robust("student")

    def of(which: "Truths") -> tuple[int, int]:
        return int((which & robust).sum()), int((which & ~robust).sum())

    return [
        ("certified", *of(certified)),
        ("not certified: the teachers' mixture is broken", *of(found.weak())),
        ("not certified: the student is too far from it", *of(found.far("exact in KL"))),
    ]


def _text(found: "Bound", names: dict[str, str], setting: "Setting", task: str) -> str:
    from mmtard_bench.evaluation.certificates import CERTIFICATES
    from mmtard_bench.records.statistics import wilson

    n, threat, share = len(found.ids), setting.threat, setting.share
    models = {
        "student": f"student: {names['student']}",
        "teachers": f"teachers: {share:g} robust + {1 - share:g} clean",
        "robust teacher": f"robust teacher: {names['robust_teacher']}",
        "clean teacher": f"clean teacher: {names['clean_teacher']}",
    }
    titles = {**models, **{name: f"bound: {name}" for name in CERTIFICATES}}
    order = ["student", *CERTIFICATES, *list(models)[1:]]

    def share_of(which: "Truths") -> str:
        low, high = wilson(int(which.sum()), n)
        return f"{100 * which.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    rows = [[titles[key], share_of(found.right(key)), share_of(found.robust(key))] for key in order]
    groups = [
        [group, robust + lost, f"{100 * (robust + lost) / n:.1f}", robust, lost]
        for group, robust, lost in _groups(found)
    ]
    table = tabulate(rows, headers=["", "clean %", "robust %"], disable_numparse=True)
    reasons = tabulate(
        groups, headers=["exact in KL", "samples", "%", "student robust", "student not robust"]
    )
    return (
        f"{names['student']} on {task}, {threat.norm} {threat.eps}, {n} samples, seed "
        f"{setting.seed}, temperature {setting.temperature:g}\n\n{table}\n\n{reasons}\n\n"
        "Every robust figure is an estimate from above: a stronger attack can only lower it."
    )
