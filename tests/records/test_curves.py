"""Curves over eps: monotone, cheap, and no higher than attacks at each radius alone."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import REFERENCE, prepare
from mmtard_bench.evaluation.loop import Batch
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.evaluation.run import Partial, run_model
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.curves import known_from_above
from mmtard_bench.records.files import from_text
from mmtard_bench.records.schema import Record, Sample, aggregate
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.tasks.suites import load_suite
from mmtard_bench.types import Eps, Suite, ThreatModel
from tests.conftest import ToyClip, wrap

CPU = torch.device("cpu")
RADII = ["1/255", "2/255", "3/255", "4/255", "6/255", "8/255"]
SUITE = """
name = "{name}"
description = "a curve"
curve = {curve}
n = {n}
seed = 0
block = 5
tasks = ["{task}"]
threats = [{threats}]
"""


def suite_of(
    folder: Path,
    *,
    attack: str = "pgd-10",
    radii: list[str] = RADII,
    n: int = 40,
    curve: bool = True,
    task: str = "digits/digit",
) -> Suite:
    threats = ", ".join(f'{{attack = "{attack}", norm = "linf", eps = "{eps}"}}' for eps in radii)
    path = folder / f"{'curve' if curve else 'plain'}-v1.toml"
    path.write_text(
        SUITE.format(name=path.stem, curve=str(curve).lower(), n=n, task=task, threats=threats)
    )
    return load_suite(str(path))


def run(suite: Suite, clip: Clip, out: Path) -> list[Record]:
    progress = RunProgress(Console(quiet=True))
    return list(run_model(clip, suite, Resources(CPU, 4), out=out, progress=progress))


def by_eps(records: list[Record]) -> dict[str, dict[str, Sample]]:
    return {r.threat.eps: {s.id: s for s in r.samples} for r in records}


def passes(record: Record) -> int:
    return sum(sample.forward + sample.backward for sample in record.samples)


def assert_monotone(records: list[Record]) -> None:
    """From the largest radius down, whoever stands goes on standing."""
    assert [record.status for record in records] == ["ok"] * len(records)
    for larger, smaller in pairwise(records):
        assert float(Eps.parse(larger.threat.eps)) > float(Eps.parse(smaller.threat.eps))
        for above, below in zip(larger.samples, smaller.samples, strict=True):
            assert below.robust >= above.robust
            assert below.clean_correct == above.clean_correct


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Records of a defended and of an undefended model, as a curve and at each radius alone."""
    found = {}
    for name in ("teacher-robust", "tiny-clip"):
        clip = mb.load_model(name)
        for curve in (True, False):
            folder = tmp_path_factory.mktemp(name)
            found[name, curve] = run(suite_of(folder, curve=curve), clip, folder)
    return found


@pytest.mark.parametrize("model", ["teacher-robust", "tiny-clip"])
def test_a_curve_is_monotone_and_each_sample_pays_for_one_failed_search(curves, model):
    records = curves[model, True]
    assert [record.threat.eps for record in records] == RADII[::-1]
    assert_monotone(records)
    for samples in zip(*(record.samples for record in records), strict=True):
        assert sum(sample.robust and sample.forward > 0 for sample in samples) <= 1
        # What was settled costs nothing below; what was broken is attacked at the next radius.
        for above, below in pairwise(samples):
            settled = above.robust or not above.clean_correct
            assert (below.forward == 0) == settled


def test_a_curve_of_a_robust_model_costs_little_more_than_its_largest_radius(curves):
    """Of an undefended model nearly all samples fall at 8/255 and many stand at 1/255.

    Each of those deserves one whole search, so the bound is for models that stand.
    """
    spent = [passes(record) for record in curves["teacher-robust", True]]
    assert spent[0] > 0
    assert sum(spent) <= 1.5 * spent[0]
    alone = [passes(record) for record in curves["teacher-robust", False]]
    assert sum(alone) > 4 * spent[0]


@pytest.mark.parametrize("model", ["teacher-robust", "tiny-clip"])
def test_a_curve_is_no_higher_than_attacks_at_each_radius_alone(curves, model):
    curve, alone = (by_eps(curves[model, way]) for way in (True, False))
    for eps in RADII:
        # Who is attacked has the verdict that the attack alone gives.
        for name, sample in curve[eps].items():
            if sample.forward:
                assert sample.robust == alone[eps][name].robust
        stand, stand_alone = (
            sum(sample.robust for sample in records[eps].values()) for records in (curve, alone)
        )
        # One sample of 40: the larger radius missed what the smaller one would have found.
        assert stand_alone <= stand <= stand_alone + 1


def test_notes_say_who_was_not_attacked_again(curves):
    records = curves["teacher-robust", True]
    standing = [sum(sample.robust for sample in record.samples) for record in records]
    assert records[0].notes == []
    assert records[1].notes == [
        f"Samples that were not attacked again: {standing[0]} stood at 8/255."
    ]
    if standing[1] > standing[0]:
        assert f", {standing[1] - standing[0]} stood at 6/255" in records[2].notes[0]
    assert all(not record.notes for record in curves["teacher-robust", False])


def test_a_curve_is_another_suite_whose_records_are_never_mixed_with_a_plain_one(curves, tmp_path):
    digests = {curve: suite_of(tmp_path, curve=curve).digest for curve in (True, False)}
    assert digests[True] != digests[False]
    both = [{r.identity for r in curves["tiny-clip", curve]} for curve in (True, False)]
    assert both[0].isdisjoint(both[1])
    # The order in the file means nothing: the largest radius comes first.
    assert suite_of(tmp_path, radii=RADII[::-1]).digest == digests[True]


def test_blocks_hold_only_those_who_are_attacked():
    data = load_task(find_task("digits/digit"), n=12, seed=0)
    clip = mb.load_model("tiny-clip")
    threat = ThreatModel("pgd-1", "linf", Eps.parse("1/255"))
    job = prepare(clip, data, threat, seed=0, engine=REFERENCE)
    whole = execute(job, Resources(CPU, 4))
    right = [sample.id for sample in whole.samples if sample.clean_correct]
    assert len(right) >= 8
    first = whole.samples[[s.id for s in whole.samples].index(right[0])]
    known = {first.id: first.model_copy(update={"robust": True, "broken_by": None, "forward": 0})}
    blocks: list[list[str]] = []

    def spy(work):
        blocks.append(list(work.ids))
        return job.attack.run(work)

    blocked = replace(job, attack=replace(job.attack, block=6, run=spy))
    record = execute(blocked, Resources(CPU, 4), known=known)
    rest = [s for s in data.manifest.ids if s not in known]
    expected = [[s for s in rest[i : i + 6] if s in right] for i in (0, 6)]
    assert blocks == [ids for ids in expected if ids]
    assert {s.id: s for s in record.samples}[first.id] == known[first.id]


def test_an_interrupted_curve_goes_on_where_it_was(tmp_path, monkeypatch, curves):
    suite, clip = suite_of(tmp_path), mb.load_model("teacher-robust")
    append, calls = Partial.append, []

    def stopped(self, batch):
        append(self, batch)
        calls.append(batch)
        if len(calls) == 4:  # the first of the second radius: 16 samples are a batch
            raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "append", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(suite, clip, tmp_path)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    again = run(suite, clip, tmp_path)
    assert [r.samples for r in again] == [r.samples for r in curves["teacher-robust", True]]
    assert [r.notes for r in again] == [r.notes for r in curves["teacher-robust", True]]
    assert run(suite, clip, tmp_path) == again


def test_what_contradicts_a_larger_radius_is_made_again(tmp_path):
    """As if the largest radius had been scored again elsewhere, and rounding saved a sample."""
    suite, clip = suite_of(tmp_path, radii=["2/255", "8/255"]), mb.load_model("tiny-clip")
    larger, smaller = run(suite, clip, tmp_path)
    assert larger.robust_accuracy < smaller.robust_accuracy
    (path,) = tmp_path.rglob("*8-255*.json")
    place = next(i for i, s in enumerate(smaller.samples) if s.broken_by is not None)
    saved = larger.samples[place].model_copy(update={"robust": True, "broken_by": None})
    samples = [*larger.samples[:place], saved, *larger.samples[place + 1 :]]
    changed = larger.model_copy(update={"samples": samples, "results": aggregate(samples)})
    from_text(changed.to_text(), "here").save(path)
    again = run(suite, clip, tmp_path)
    assert_monotone(again)
    assert again[1].samples[place].robust
    # And back: who stood only on that word is attacked again.
    larger.save(path)
    assert [r.samples for r in run(suite, clip, tmp_path)] == [larger.samples, smaller.samples]


def test_an_interrupted_evaluation_that_contradicts_a_larger_radius_makes_no_curve_rise():
    """Its sample was broken before the larger radius was scored again, where it is robust."""
    data = load_task(find_task("digits/digit"), n=16, seed=0)
    clip = mb.load_model("student-tecoa")
    large, small = (ThreatModel("pgd-3", "linf", Eps.parse(eps)) for eps in ("2/255", "1/255"))
    above = execute(prepare(clip, data, large, seed=0), Resources(CPU, 16))
    known, notes = known_from_above(small, [above])
    victim = next(sample for sample in above.samples if sample.robust)
    old = victim.model_copy(update={"robust": False, "broken_by": "pgd-3", "forward": 4})
    job = prepare(clip, data, small, seed=0)
    whole = execute(job, Resources(CPU, 16), known=known, notes=notes)
    again = execute(
        job, Resources(CPU, 16), earlier=[Batch([old], [], 0.0)], known=known, notes=notes
    )
    assert again.samples == whole.samples
    assert again.robust_accuracy >= above.robust_accuracy
    assert again.notes == [
        *whole.notes,
        "Samples that an interrupted evaluation broke at this radius, but that count as robust "
        "because they are so at a larger radius that was scored since: 1.",
    ]


def test_after_a_radius_that_failed_the_next_one_starts_afresh(tmp_path):
    class Moody(ToyClip):
        broken = True

        def encode_image(self, images):
            features = super().encode_image(images)
            return features * float("nan") if self.broken else features

    suite, clip = suite_of(tmp_path, attack="pgd-2", n=24), wrap(Moody())
    progress = RunProgress(Console(quiet=True))
    found = []
    for record in run_model(clip, suite, Resources(CPU, 16), out=tmp_path, progress=progress):
        found.append(record)
        Moody.broken = False
    assert [record.status for record in found] == ["error"] + ["ok"] * 5
    assert found[1].notes == []
    assert all(sample.forward > 0 for sample in found[1].samples if sample.clean_correct)
    assert_monotone(found[1:])
    assert_monotone(run(suite, clip, tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "digits/retrieval"}, "curve = true and retrieval tasks"),
        ({"radii": ["8/255"]}, "no attack at two radii"),
    ],
)
def test_suites_that_can_have_no_curve(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        suite_of(tmp_path, **changes)
