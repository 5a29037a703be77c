"""Robust samples are checked by Square, and what it breaks is a flag of the record."""

import json
import math

import pytest
import torch
from hypothesis import given, strategies as st
from pydantic import ValidationError

import mmtard_bench as mb
from mmtard_bench.evaluation.black_box import (
    FEW,
    FEWEST_DRAWN,
    LEAST,
    MANY,
    MOST,
    SHARE,
    check_by_square,
    plan,
)
from mmtard_bench.evaluation.checks import check_samples
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.evaluation.processes import Processes
from mmtard_bench.leaderboard.badges import MASKING
from mmtard_bench.records.black_box import FEWEST, HONEST, LEVEL, BlackBox, wants_check
from mmtard_bench.records.files import from_text
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, ThreatModel
from tests.cheats.models import checker

CODE = "black-box-beats-gradients"


def scored(model, n=FEWEST, threat="pgd-5", **options):
    return mb.evaluate(model, task="digits/digit", threat=threat, eps="8/255", n=n, **options)


def test_square_finds_that_the_gradients_of_a_decoy_mislead(tmp_path):
    record = scored(checker(tmp_path / "decoy"))
    assert record.robust_accuracy > 0.5
    assert record.black_box.broken >= 3
    (flag,) = [flag for flag in record.flags if flag.code == CODE]
    assert f"broke {record.black_box.broken} of {record.black_box.drawn} samples" in flag.detail
    assert CODE in MASKING


def test_an_honest_model_is_checked_and_gets_no_flag():
    steps = []
    record = scored("teacher-robust", progress=steps.append)
    assert record.black_box == BlackBox(attack=f"square-{FEW}", drawn=FEWEST_DRAWN, broken=0)
    assert record.flags == []
    assert from_text(record.to_text(), "here") == record
    assert steps[-1].settled == steps[-1].total == FEWEST
    assert any("check without gradients" in step.pulse.stage for step in steps)
    without = scored("teacher-robust", black_box=False)
    assert without.black_box is None
    assert "black_box" not in json.loads(without.to_text())
    assert (without.samples, without.identity) == (record.samples, record.identity)
    assert scored("teacher-robust", n=FEWEST - 1).black_box is None


def test_nothing_robust_is_nothing_to_check():
    record = scored("tiny-clip", threat="pgd-10")
    assert record.robust_accuracy == 0
    assert (record.black_box.drawn, record.black_box.broken) == (0, 0)


@pytest.mark.parametrize(
    ("attack", "norm", "metric", "n", "wanted"),
    [
        ("pgd-20", "linf", "zero-shot classification", 50, True),
        ("cw-l2", "l2", "zero-shot classification", 1000, True),
        ("joint-charmer-k1-pgd-5", "linf", "zero-shot classification", 50, True),
        ("pgd-20", "linf", "zero-shot classification", 49, False),
        ("pgd-20", "linf", "retrieval", 1000, False),
        ("text-charmer-k1", "levenshtein", "zero-shot classification", 1000, False),
        ("square-500", "linf", "zero-shot classification", 1000, False),
        ("autoattack-standard", "linf", "zero-shot classification", 1000, False),
    ],
)
def test_which_records_are_checked(attack, norm, metric, n, wanted):
    assert wants_check(attack, norm, metric, n) is wanted


@given(passes=st.integers(0, 10**8), robust=st.integers(0, 5000))
def test_the_check_costs_a_share_of_the_passes(passes, robust):
    queries, count = plan(passes, robust)
    assert FEW <= queries <= MANY
    assert min(FEWEST_DRAWN, robust) <= count <= min(MOST, robust)
    assert queries * count <= max(SHARE * passes, LEAST)
    if robust >= MOST and passes >= MOST * MANY / SHARE:
        assert (queries, count) == (MANY, MOST)


@given(st.integers(0, 128).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_the_flag_follows_a_binomial_test(case):
    drawn, broken = case
    p = sum(
        math.comb(drawn, k) * HONEST**k * (1 - HONEST) ** (drawn - k)
        for k in range(broken, drawn + 1)
    )
    check = BlackBox(attack="square-100", drawn=drawn, broken=broken)
    assert check.beats_gradients is (p < LEVEL)
    assert [flag.code for flag in check_samples([], "pgd-5", check)] == [CODE] * (p < LEVEL)


def test_no_more_can_be_broken_than_is_drawn():
    with pytest.raises(ValidationError, match="9 of 8 samples are broken"):
        BlackBox(attack="square-100", drawn=8, broken=9)


def test_the_shares_of_two_processes_are_the_draw_of_one(monkeypatch):
    """Each process attacks its share: together they attack each drawn sample once."""
    clip, data = (
        mb.load_model("teacher-robust"),
        load_task(find_task("digits/digit"), n=FEWEST, seed=0),
    )
    threat = ThreatModel("pgd-2", "linf", Eps.parse("2/255"))
    job = prepare(clip, data, threat, seed=0)
    attacked = []

    def attack_again(clip, data, threat, resources, **_):
        attacked.append(data.manifest.ids)
        return iter(())

    whole = execute(job, Resources(torch.device("cpu")))
    monkeypatch.setattr("mmtard_bench.evaluation.black_box.attack_again", attack_again)
    for rank in range(3):
        processes = Processes(rank, 3)
        resources = Resources(torch.device("cpu"), processes=processes)
        check_by_square(job, resources, whole.samples, lambda _: None)
    ids = [name for share in attacked for name in share]
    assert len(ids) == len(set(ids)) == whole.black_box.drawn
    assert set(ids) <= {sample.id for sample in whole.samples if sample.robust}
