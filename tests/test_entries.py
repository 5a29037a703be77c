"""What is published under leaderboard/ follows from its records, and keeps its word."""

import pytest

import mmtard_bench as mb
from mmtard_bench.leaderboard import load_records, render
from mmtard_bench.suites import load_suite
from tests.conftest import REPOSITORY

LEADERBOARD = REPOSITORY / "leaderboard"


@pytest.fixture(scope="module")
def records():
    return load_records(LEADERBOARD / "entries")


def test_the_page_follows_from_the_records(records):
    assert (LEADERBOARD / "README.md").read_text("utf-8") == render(records)


def test_the_records_are_of_the_suites_and_weights_that_ship(records):
    digests = {name: mb.load_model(name).digest for name in ("tiny-clip", "tiny-tecoa")}
    for record in records:
        assert record.suite.digest == load_suite(record.suite.name).digest
        assert record.model.digest == digests[record.model.name]
        assert record.flags == []


def accuracies(records, model, task, attack="autoattack-standard"):
    (record,) = [
        r
        for r in records
        if (r.suite.name, r.model.name, r.task.name) == ("digits-v1", model, task)
        and r.threat.attack == attack
    ]
    assert record.threat.eps == "8/255"
    assert len(record.samples) >= 500
    return record.clean_accuracy, record.robust_accuracy


def test_the_tiny_models_reach_their_targets(records):
    clean, robust = accuracies(records, "tiny-clip", "digits/digit")
    assert clean >= 0.95
    assert robust <= 0.05
    assert accuracies(records, "tiny-clip", "digits/unseen")[0] >= 0.90
    clean, robust = accuracies(records, "tiny-tecoa", "digits/digit")
    assert clean >= 0.85
    assert robust >= 0.45
