"""Records: what is stored follows from the samples, and any edit is noticed."""

import json
import random

import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest

from mmtard_bench.errors import InputError
from mmtard_bench.records import (
    Environment,
    ModelFacts,
    Record,
    Sample,
    TaskFacts,
    ThreatFacts,
    aggregate,
    digest_of,
    from_text,
    identity,
    read_record,
    to_text,
    wilson,
    write_record,
)


def sample(number: int, outcome: str) -> Sample:
    """A sample that is "wrong" on the clean image, "robust", or "broken"."""
    return Sample(
        id=f"s/{number}",
        label=number % 3,
        prediction=(number + (outcome == "wrong")) % 3,
        clean_correct=outcome != "wrong",
        robust=outcome == "robust",
        broken_by="pgd-5" if outcome == "broken" else None,
        unconfirmed=False,
        forward=6,
        backward=5,
    )


def record_of(samples: list[Sample], name: str = "m", attack: str = "pgd-5") -> Record:
    facts = {
        "suite": None,
        "model": ModelFacts(
            name=name, source=name, digest="d", parameters=3, preprocessing={"size": [32, 32]}
        ),
        "task": TaskFacts(
            name="t",
            data="d",
            revision="r",
            split=None,
            convert_rgb=False,
            n_classes=3,
            templates=["{}"],
            prompts_digest="0" * 64,
            metric="zero-shot classification",
        ),
        "threat": ThreatFacts(
            attack=attack,
            norm="linf",
            eps="8/255",
            surface="native",
            parameters={"steps": 5},
            block=None,
        ),
        "seed": 0,
        "precision": "float32",
        "sample_ids_digest": digest_of([s.id for s in samples]),
    }
    return Record(
        schema_version=1,
        identity=identity(**facts),
        status="ok",
        error=None,
        results=aggregate(samples),
        flags=[],
        notes=["é"],
        environment=Environment(
            versions={"torch": "2"},
            python="3.11",
            platform="x",
            device="cpu",
            threads=1,
            batch_size=64,
            git_revision=None,
        ),
        seconds=1.5,
        created="2026-11-24T00:00:00+00:00",
        samples=samples,
        **facts,
    )


OUTCOMES = st.lists(st.sampled_from(["wrong", "robust", "broken"]), min_size=1, max_size=30)


@given(outcomes=OUTCOMES)
def test_a_record_survives_a_round_trip_and_its_aggregates_follow(outcomes):
    record = record_of([sample(i, o) for i, o in enumerate(outcomes)])
    again = from_text(to_text(record), "here")
    assert again == record
    n = len(outcomes)
    assert again.robust_accuracy == outcomes.count("robust") / n
    assert again.clean_accuracy == (n - outcomes.count("wrong")) / n
    low, high = again.interval
    assert 0 <= low <= again.robust_accuracy <= high <= 1


@settings(max_examples=150)
@given(outcomes=OUTCOMES, place=st.floats(0, 1, exclude_max=True), value=st.integers(32, 126))
def test_any_edit_of_a_stored_file_is_detected(outcomes, place, value):
    text = to_text(record_of([sample(i, o) for i, o in enumerate(outcomes)]))
    i = int(place * len(text))
    edited = text[:i] + chr(value) + text[i + 1 :]
    if edited != text:
        with pytest.raises(InputError, match="edited"):
            from_text(edited, "here")


@given(outcomes=OUTCOMES, place=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_detected(outcomes, place):
    text = to_text(record_of([sample(i, o) for i, o in enumerate(outcomes)]))
    with pytest.raises(InputError, match="cut short"):
        from_text(text[: int(place * len(text))], "here")


FORGERIES = {
    "a better accuracy": lambda body: body["results"].update(robust_accuracy=1.0),
    "a verdict without its aggregate": lambda body: body["samples"][1].update(
        robust=True, broken_by=None
    ),
    "another id": lambda body: body["samples"][0].update(id="s/99"),
    "a sample less": lambda body: body["samples"].pop(),
    "a sample twice": lambda body: body["samples"].append(body["samples"][0]),
    "another seed": lambda body: body.update(seed=1),
    "another radius": lambda body: body["threat"].update(eps="1/255"),
    "other weights": lambda body: body["model"].update(digest="e"),
    "an unknown key": lambda body: body.update(extra=1),
    "robust though wrong": lambda body: body["samples"][0].update(prediction=2),
    "a wrong type": lambda body: body["samples"][0].update(robust="true"),
    "no results": lambda body: body.update(results=None),
    "a failure with results": lambda body: body.update(status="error", error="x"),
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_with_a_fresh_hash_is_still_refused(forgery):
    """Whoever recomputes the closing hash must still make the record agree with itself."""
    import hashlib

    body = json.loads(to_text(record_of([sample(0, "robust"), sample(1, "broken")])))
    forgery(body)
    del body["sha256"]
    samples = body.pop("samples")
    head = json.dumps(body, indent=1, ensure_ascii=False)
    lines = ",\n".join(f"  {json.dumps(s)}" for s in samples)
    text = f'{head[:-2]},\n "samples": [\n{lines}\n ]'
    text = f'{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'
    with pytest.raises(InputError):
        from_text(text, "here")


def test_wilson_agrees_with_scipy():
    generator = random.Random(0)
    for _ in range(50):
        n = generator.randint(1, 2000)
        k = generator.randint(0, n)
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_writing_is_atomic_and_leaves_no_litter(tmp_path):
    record = record_of([sample(0, "robust")])
    write_record(tmp_path / "a" / "r.json", record)
    assert read_record(tmp_path / "a" / "r.json") == record
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.json"]


def test_a_directory_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(InputError, match="could not be written"):
        write_record(tmp_path / "a" / "r.json", record_of([sample(0, "robust")]))
