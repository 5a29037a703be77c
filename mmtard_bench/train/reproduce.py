"""Methods x seeds: train every student, score it under AutoAttack, compare with the baseline."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation import find_device
from mmtard_bench.models.loading import load_model
from mmtard_bench.progress import RunProgress
from mmtard_bench.records import Record
from mmtard_bench.registry import near_matches
from mmtard_bench.runner import run_model
from mmtard_bench.suites import load_suite
from mmtard_bench.train.recipe import load_recipe
from mmtard_bench.train.report import write_report
from mmtard_bench.train.session import Place, train
from mmtard_bench.train.study import Score, Study
from mmtard_bench.train.watch import History

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
    """Run a study and write its report; whatever is there already is used, not made again.

    Students are trained and scored seed by seed, so that an interrupted study holds whole seeds.
    Returns the report's path. Raises InputError for unknown names, and what training and scoring
    raise.
    """
    if name not in STUDIES:
        raise InputError(f"There is no study '{name}'. {near_matches(name, STUDIES)}")
    study = STUDIES[name]
    chosen = tuple(methods or study.methods)
    for method in chosen:
        load_recipe(f"{study.family}/{method}", overrides)
    if study.baseline not in chosen:
        raise InputError(
            f"A study compares with '{study.baseline}'; add --method {study.baseline}."
        )
    scores: dict[tuple[str, int], Score] = {}
    scorer = find_device(device)
    for seed in range(seeds):
        for method in chosen:
            console.print(f"{study.family}/{method}, seed {seed}", highlight=False)
            folder = out / "checkpoints" / f"{method}-seed{seed}"
            named = load_recipe(f"{study.family}/{method}", overrides)
            train(named, Place(folder, seed=seed, resume=True, cpu=device == "cpu"), console)
            scores[method, seed] = _score(study, folder, out, scorer, console)
    study = replace(study, methods=chosen)
    report = write_report(study, scores, seeds=seeds, overrides=overrides, folder=out)
    console.print(report.read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)
    return report


def _score(study: Study, folder: Path, out: Path, device: torch.device, console: Console) -> Score:
    # Records are found by name: it must not follow from how the path was typed.
    clip = replace(load_model(f"local-dir:{folder}"), name=folder.name)
    records: dict[str, Record] = {}
    with RunProgress(console) as progress:
        for suite in (study.robust_suite, study.unseen_suite):
            (records[suite],) = run_model(
                clip,
                load_suite(suite),
                out=out / "records",
                batch_size=256,
                device=device,
                progress=progress,
            )
    for record in records.values():
        if record.error is not None:
            raise InputError(f"{folder} could not be scored: {record.error}")
    named, unseen = records[study.robust_suite].samples, records[study.unseen_suite].samples
    return Score(
        clean=[sample.clean_correct for sample in named],
        robust=[sample.robust for sample in named],
        unseen=[sample.clean_correct for sample in unseen],
        curve=_curve(folder),
    )


def _curve(folder: Path) -> list[tuple[float, float, float]]:
    key = "validation/robust"
    lines = [line for line in History(folder).read() if key in line]
    return [(line["step"], line["seconds"], line[key]) for line in lines]
