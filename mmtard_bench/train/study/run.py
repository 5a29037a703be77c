"""Run a study: train a student per method and seed, score it, compare it with the baseline."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
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
from mmtard_bench.train.recipe import Named, load_recipe
from mmtard_bench.train.session import Place, train
from mmtard_bench.train.study.report import write_report
from mmtard_bench.train.study.statistics import Score, Study
from mmtard_bench.train.watch import History

AT_CHANCE: SampleCode = "clean-accuracy-at-chance"

STUDIES = {
    "digits": Study(
        family="digits",
        methods=("clean-ft", "tecoa", "fare", "pmg-aft", "ard", "mmt-ard-shipped", "mmt-ard"),
        baseline="ard",
        robust_suite="reproduce-digits-v1",
        unseen_suite="reproduce-unseen-v1",
    )
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
    study = STUDIES[name]
    chosen = tuple(methods or study.methods)
    recipes = {method: load_recipe(f"{study.family}/{method}", overrides) for method in chosen}
    if study.baseline not in chosen:
        raise InputError(
            f"A study compares with '{study.baseline}'; add --method {study.baseline}."
        )
    scores: dict[tuple[str, int], Score] = {}
    scorer = find_device(device)
    for seed in range(seeds):
        for method, named in recipes.items():
            console.print(f"{study.family}/{method}, seed {seed}", highlight=False)
            folder = out / "checkpoints" / f"{method}-seed{seed}"
            place = Place(folder, seed=seed, resume=True, cpu=device == "cpu")
            _require_same_validation(train(named, place, console), named, folder)
            scores[method, seed] = _score(study, folder, out, scorer, console)
    words = ["mmtard-bench", "reproduce", name, "--seeds", str(seeds)]
    words += [word for method in methods or () for word in ("--method", method)]
    words += [word for override in overrides for word in ("--set", override)]
    report = write_report(
        replace(study, methods=chosen),
        scores,
        seeds=seeds,
        recipes={method: named.recipe for method, named in recipes.items()},
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


def _score(study: Study, folder: Path, out: Path, device: torch.device, console: Console) -> Score:
    # The name finds the records again, so it must not depend on how the path is written.
    clip = replace(load_model(f"local-dir:{folder}"), name=folder.name)
    records: dict[str, Record] = {}
    with RunProgress(console) as progress:
        for suite in (study.robust_suite, study.unseen_suite):
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
    return score_of(records[study.robust_suite], records[study.unseen_suite], _curve(folder))


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
