"""A study from end to end, small: students are trained, scored, reported, and not made twice."""

import pytest
from rich.console import Console

from mmtard_bench.errors import InputError
from mmtard_bench.records.files import load_records
from mmtard_bench.train.study.run import reproduce

QUICK = ["steps=2", "batch=16", "train=digits/validation", "validation.every=1"]


@pytest.fixture
def study(tmp_path):
    def run(*overrides):
        return reproduce(
            "digits",
            out=tmp_path / "study",
            seeds=1,
            methods=["ard", "clean-ft"],
            overrides=[*QUICK, "validation.samples=10", "attack.steps=1", *overrides],
            device="cpu",
            console=Console(quiet=True),
        )

    return run


def test_a_study_is_measured_once(study, tmp_path, monkeypatch):
    page = study()
    records = load_records(tmp_path / "study" / "records")
    assert {(r.suite.name, r.threat.attack) for r in records} == {
        ("reproduce-digits-v1", "autoattack-standard"),
        ("reproduce-unseen-v1", "pgd-20"),
    }
    assert len(records) == 4
    assert {r.model.name for r in records} == {"ard-seed0", "clean-ft-seed0"}
    rows = (tmp_path / "study" / "students.csv").read_text().splitlines()[1:]
    for row in rows:
        method, seed, clean, robust, _, _ = row.split(",")
        source = f"local-dir:{tmp_path}/study/checkpoints/{method}-seed{seed}"
        (record,) = [
            r for r in records if r.model.source == source and r.suite.name == "reproduce-digits-v1"
        ]
        assert float(clean) == pytest.approx(record.clean_accuracy, abs=1e-4)
        assert float(robust) == pytest.approx(record.robust_accuracy, abs=1e-4)
    text = page.read_text()
    # What is there already is used: neither training nor an attack may run again.
    monkeypatch.setattr("mmtard_bench.train.session.Session._steps", None)
    monkeypatch.setattr("mmtard_bench.evaluation.run.execute", None)
    assert study().read_text() == text
    with pytest.raises(InputError, match="their training curves cannot be compared"):
        study("validation.samples=11")
