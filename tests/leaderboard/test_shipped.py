"""What is published under leaderboard/ follows from its records, and keeps its word."""

import pytest

import mmtard_bench as mb
from mmtard_bench import registry
from mmtard_bench.leaderboard.board import read_board
from mmtard_bench.leaderboard.markdown import render
from mmtard_bench.leaderboard.page import site
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.tasks.suites import load_suite
from mmtard_bench.train.checkpoint import Card
from tests.conftest import REPOSITORY

LEADERBOARD = REPOSITORY / "leaderboard"


@pytest.fixture(scope="module")
def records():
    return read_board(LEADERBOARD / "entries").records


def test_the_page_follows_from_the_records():
    board = read_board(LEADERBOARD / "entries")
    made = site(board, beside="README.md")
    made["README.md"] = render(board, beside=made)
    for name, text in made.items():
        assert (LEADERBOARD / name).read_text("utf-8") == text, name


def test_the_records_are_of_the_suites_and_weights_that_ship(records):
    shipped = {(clip.name, clip.digest) for clip in map(mb.load_model, registry.models)}
    ranked = {(record.model.name, record.model.digest) for record in records}
    # Start models of the study backbones: undefended, and no entries.
    starts = {(name, mb.load_model(name).digest) for name in ("tiny-clip-deep", "tiny-vit")}
    assert ranked == shipped - starts
    cards = WEIGHTS.glob("*.json")
    named = {path.stem: Card.model_validate_json(path.read_text()) for path in cards}
    assert len(named) == 9
    for name, card in named.items():
        assert (name, card.weights_digest) in shipped
        origin = {"student": card.recipe["student"]}
        origin |= {f"{role} teacher": model for role, model in card.recipe["teachers"].items()}
        for role, model in origin.items():
            assert (model, card.origin.digests[role]) in shipped
    for record in records:
        assert record.suite.digest == load_suite(record.suite.name).digest
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
    clean, robust = accuracies(records, "teacher-robust", "digits/digit")
    assert clean >= 0.85
    assert robust >= 0.45


def test_a_defended_student_stands_and_an_undefended_one_falls(records):
    assert accuracies(records, "student-clean-ft", "digits/digit")[1] <= 0.05
    ard = accuracies(records, "student-ard", "digits/digit")[1]
    assert 0.2 <= ard < accuracies(records, "student-mmt-ard", "digits/digit")[1]
