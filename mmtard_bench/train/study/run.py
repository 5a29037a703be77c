"""Run a study: train a student per method and seed, score it, compare it with the baseline."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.checks import SampleCode
from mmtard_bench.evaluation.device import Resources, find_device
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.evaluation.run import run_model
from mmtard_bench.models.loading import load_model
from mmtard_bench.records.schema import Record, digest_of
from mmtard_bench.registry import near_matches
from mmtard_bench.tasks.suites import load_suite
from mmtard_bench.train.checkpoint import Card
from mmtard_bench.train.methods import METHODS
from mmtard_bench.train.recipe import Named, load_recipe
from mmtard_bench.train.session import Place, train
from mmtard_bench.train.study import backbones, frontier
from mmtard_bench.train.study.report import write_report
from mmtard_bench.train.study.statistics import Score, Study, Variant
from mmtard_bench.train.watch import History

AT_CHANCE: SampleCode = "clean-accuracy-at-chance"

DIGITS = Study(
    family="digits",
    methods=("clean-ft", "tecoa", "fare", "pmg-aft", "ard", "mmt-ard-shipped", "mmt-ard"),
    baseline="ard",
    robust_suite="reproduce-digits-v1",
    unseen_suite="reproduce-unseen-v1",
)


@dataclass(frozen=True)
class Plan:
    """The students of a study, those methods that it trains by default, and its report."""

    variants: tuple[Variant, ...]
    methods: tuple[str, ...]
    write: Callable[..., Path]


STUDIES = {
    "digits": Plan(
        tuple(Variant(method, method) for method in METHODS), DIGITS.methods, write_report
    ),
    "backbones": Plan(backbones.BACKBONES, backbones.METHODS, backbones.write_backbones),
    "frontier": Plan(frontier.FRONTIER, frontier.METHODS, frontier.write_frontier),
}


def reproduce(
    name: str,
    *,
    out: Path,
    seeds: int,
    methods: Sequence[str] | None,
    overrides: Sequence[str],
    device: str,
    console: Console,
) -> Path:
    """Run a study and write its report. Finished students and records are reused.

    Students are trained and scored seed by seed, so that an interrupted study has complete seeds.

    Returns:
        The path of the report.

    Raises:
        InputError: For unknown names, and for errors in training or scoring.
    """
    if name not in STUDIES:
        raise InputError(f"There is no study '{name}'. {near_matches(name, STUDIES)}")
    plan = STUDIES[name]
    known = dict.fromkeys(variant.method for variant in plan.variants)
    chosen = tuple(methods or plan.methods)
    for method in chosen:
        if method not in known:
            raise InputError(
                f"The study '{name}' has no method '{method}'. {near_matches(method, known)}"
            )
    if DIGITS.baseline not in chosen:
        raise InputError(
            f"A study compares with '{DIGITS.baseline}'; add --method {DIGITS.baseline}."
        )
    recipes = {
        variant.label: load_recipe(
            f"{DIGITS.family}/{variant.method}", (*variant.changes, *overrides)
        )
        for variant in plan.variants
        if variant.method in chosen
    }
    scores: dict[tuple[str, int], Score] = {}
    scorer = find_device(device)
    for seed in range(seeds):
        for label, named in recipes.items():
            console.print(f"{label}, seed {seed}", highlight=False)
            folder = out / "checkpoints" / f"{label}-seed{seed}"
            place = Place(folder, seed=seed, resume=True, cpu=device == "cpu")
            card = train(named, place, console)
            _require_same_validation(card, named, folder)
            scores[label, seed] = replace(
                _score(folder, out, scorer, console), parameters=card.trainable_parameters
            )
    words = ["mmtard-bench", "reproduce", name, "--seeds", str(seeds)]
    words += [word for method in methods or () for word in ("--method", method)]
    words += [word for override in overrides for word in ("--set", override)]
    report = plan.write(
        replace(DIGITS, methods=chosen),
        scores,
        seeds=seeds,
        recipes={label: named.recipe for label, named in recipes.items()},
        command=shlex.join(words),
        folder=out,
    )
    console.print(report.read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)
    return report


def _require_same_validation(card: Card, named: Named, folder: Path) -> None:
    """Raise InputError if a finished student was validated with other settings than ``named``."""
    before, now = card.recipe["validation"], named.recipe.model_dump()["validation"]
    if digest_of(before) != digest_of(now):
        raise InputError(
            f"{folder} was validated with {before}, but the recipe has {now}, so their training "
            "curves cannot be compared. Use the same validation, or another --out."
        )


def _score(folder: Path, out: Path, device: torch.device, console: Console) -> Score:
    # The name finds the records again, so it must not depend on how the path is written.
    clip = replace(load_model(f"local-dir:{folder}"), name=folder.name)
    records: dict[str, Record] = {}
    with RunProgress(console) as progress:
        for suite in (DIGITS.robust_suite, DIGITS.unseen_suite):
            (records[suite],) = run_model(
                clip,
                load_suite(suite),
                Resources(device),
                out=out / "records",
                progress=progress,
            )
    for record in records.values():
        if record.error is not None:
            raise InputError(f"{folder} could not be scored: {record.error}")
    return score_of(records[DIGITS.robust_suite], records[DIGITS.unseen_suite], _curve(folder))


def score_of(robust: Record, unseen: Record, curve: list[tuple[float, float, float]]) -> Score:
    """The score of a student from its records of the robust and of the unseen suite."""
    return Score(
        clean=[sample.clean_correct for sample in robust.samples],
        robust=[sample.robust for sample in robust.samples],
        unseen=[sample.clean_correct for sample in unseen.samples],
        curve=curve,
        at_chance=any(flag.code == AT_CHANCE for flag in (*robust.flags, *unseen.flags)),
    )


def _curve(folder: Path) -> list[tuple[float, float, float]]:
    key = "validation/robust"
    lines = [line for line in History(folder).read() if key in line]
    return [(line["step"], line["seconds"], line[key]) for line in lines]
