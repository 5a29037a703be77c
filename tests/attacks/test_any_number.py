"""Every stage, part and batch takes any number of samples, and verdicts stay the same."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mmtard_bench import registry
from mmtard_bench.attacks.base import AttackResult, Engine, Work
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.attacks.fast import ensemble
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Samples
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.loop import Batch
from mmtard_bench.registry import attack_family
from mmtard_bench.types import Eps, ThreatModel
from tests.attacks.toys import KINDS, kind_of, toy_clip, toy_data, toy_job
from tests.conftest import Linear
from tests.evaluation.test_run import truth

CPU = torch.device("cpu")
ENSEMBLES = {
    "pgd-4": "easy",
    "cw-linf-4": "easy masked",
    "apgd-pair": "easy masked",
    "apgd-pair-5r": "easy masked",
    "autoattack-standard": "easy masked",
}
"""With the kinds of samples that each breaks."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_clip(), toy_data(tmp_path_factory.mktemp("toy"), 16)


def evaluated(toy, name, rows, size, *, earlier=(), engine="fast"):
    """The record of some of the toy's samples, and the batches that were kept."""
    clip, data = toy
    kept: list[Batch] = []
    job = toy_job(clip, data.at(rows), name, engine=engine)
    resources = Resources(CPU, size, workers=0)
    record = execute(job, resources, earlier=earlier, keep=kept.append)
    assert record.status == "ok", record.error
    assert all(batch.samples for batch in kept)
    return record, kept


def rows_of(toy, counts):
    """So many samples of each kind, in a mixed order."""
    ids = toy[1].manifest.ids
    rows = []
    for kind, count in zip(KINDS, counts, strict=True):
        rows += [row for row, name in enumerate(ids) if kind_of(name) == kind][:count]
    random.Random(0).shuffle(rows)
    return rows


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(ENSEMBLES)),
    counts=st.one_of(
        st.tuples(*[st.integers(0, 6)] * 4),
        st.sampled_from([(16, 0, 0, 0), (0, 16, 0, 0), (0, 0, 16, 0), (8, 8, 0, 0), (1, 0, 0, 0)]),
    ).filter(any),
    sizes=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    share=st.floats(0, 1),
)
def test_fast_ensembles_give_one_verdict_whole_and_resumed(toy, name, counts, sizes, share):
    rows = rows_of(toy, counts)
    whole, kept = evaluated(toy, name, rows, sizes[0])
    for sample in whole.samples:
        assert sample.clean_correct == (kind_of(sample.id) != "wrong")
        broken = kind_of(sample.id) in ENSEMBLES[name].split()
        assert (sample.broken_by is not None) == broken
    prefix = kept[: round(share * len(kept))]
    resumed, _ = evaluated(toy, name, rows, sizes[1], earlier=prefix)
    assert resumed.samples == whole.samples
    assert resumed.results == whole.results


@pytest.mark.parametrize("counts", [(6, 0, 0, 0), (3, 3, 0, 1), (0, 0, 6, 0), (0, 0, 0, 4)])
@pytest.mark.parametrize("name", ["pgd-4", "apgd-pair"])
def test_the_reference_engine_takes_any_number(toy, name, counts):
    rows = rows_of(toy, counts)
    whole, kept = evaluated(toy, name, rows, 4, engine="reference")
    for end in range(len(kept) + 1):
        resumed, _ = evaluated(toy, name, rows, 3, earlier=kept[:end], engine="reference")
        assert truth(resumed) == truth(whole)
    right = [sample for sample in whole.samples if sample.clean_correct]
    assert [sample.robust for sample in right] == [
        kind_of(sample.id) not in ENSEMBLES[name].split() for sample in right
    ]


@pytest.mark.parametrize("left", [[], [1], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", list(ENSEMBLES))
def test_every_stage_takes_none_one_and_all(name, left, monkeypatch):
    stages = []
    monkeypatch.setattr(ensemble, "staged", lambda threat, given, *_: stages.extend(given))
    threat = ThreatModel(name, "linf", Eps.parse("64/255"))
    registry.fast_attacks.get(attack_family(name))(threat, 5, "float32")
    model = Linear(5)
    images, labels = model.samples(4)
    work = Work(model=model, images=images, labels=labels, ids="abcd", seed=0, batch_size=3)
    assert stages
    for search in stages:
        samples = Samples(images, labels, labels.new_full((4, search.variants), -1), "abcd")
        under = ensemble._Samples(Passes(model, CPU, "float32"), samples, work)
        assert under.stage(replace(search, steps=4), left) == []
        assert [place for place, by in enumerate(under.result.broken_by) if by] == left


EVERY = {
    **dict.fromkeys(["pgd-3", "apgd-pair", "autoattack-standard", "autoattack-rand"], "linf"),
    "cw-l2": "l2",
}


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("name", list(EVERY))
def test_no_attack_needs_a_sample(name, engine):
    model = Linear(5)
    threat = ThreatModel(name, EVERY[name], Eps.parse("8/255"))
    attack = build_attack(threat, n_classes=5, engine=Engine(engine))
    images, labels = model.samples(2)
    work = Work(model=model, images=images[:0], labels=labels[:0], ids=[], seed=0, batch_size=4)
    assert list(attack.parts(work)) == []


def test_parts_without_samples_are_dropped_and_batches_have_one(toy):
    clip, data = toy
    job = toy_job(clip, data.at(rows_of(toy, (3, 3, 0, 1))), "pgd-4")

    def with_holes(work):
        nothing = AttackResult(work.images[:0], [], [], [])
        yield [], nothing
        for part in job.attack.run(work):
            yield part
            yield [], nothing

    holes = replace(job, attack=replace(job.attack, run=with_holes))
    record, whole = (execute(j, Resources(CPU, 2, workers=0)) for j in (holes, job))
    assert record.status == "ok", record.error
    assert record.samples == whole.samples
    with pytest.raises(ValueError, match="without samples"):
        Batch([], [], 0.0)


def test_an_attack_that_gives_no_result_for_a_sample_is_an_error(toy):
    clip, data = toy
    job = toy_job(clip, data.at(rows_of(toy, (3, 0, 0, 0))), "pgd-4")

    def half(work):
        ((places, result),) = job.attack.run(work)
        yield places[:2], result.of([0, 1])

    lacking = replace(job, attack=replace(job.attack, run=half))
    record = execute(lacking, Resources(CPU, 4, workers=0))
    assert record.error == (
        "The attack pgd-4 gave no result for 1 of 3 samples; expected one for each."
    )
