"""Records: what is stored follows from the samples, and any edit is noticed."""

import hashlib
import json
import random
import re

import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest

from mmtard_bench.errors import InputError
from mmtard_bench.records import edits
from mmtard_bench.records.edits import NameEdit
from mmtard_bench.records.files import from_text, read_record
from mmtard_bench.records.recall import Ranks
from mmtard_bench.records.schema import (
    SCHEMA_VERSION,
    Environment,
    ModelFacts,
    Record,
    Sample,
    TaskFacts,
    ThreatFacts,
    aggregate,
    digest_of,
    identity,
)
from mmtard_bench.records.statistics import wilson


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


def record_of(
    samples: list[Sample],
    name: str = "m",
    attack: str = "pgd-5",
    task: dict[str, object] | None = None,
    threat: dict[str, object] | None = None,
    version: int = SCHEMA_VERSION,
) -> Record:
    """A record of these samples; ``task`` and ``threat`` have facts that differ from the usual."""
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
        ).model_copy(update=task),
        "threat": ThreatFacts(
            attack=attack,
            norm="linf",
            eps="8/255",
            surface="native",
            parameters={"steps": 5},
            block=None,
        ).model_copy(update=threat),
        "seed": 0,
        "precision": "float32",
        "sample_ids_digest": digest_of([s.id for s in samples]),
    }
    return Record(
        schema_version=version,
        identity=identity(version=version, **facts),
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


def test_records_of_the_first_version_stay_readable_under_an_identity_of_their_own():
    old, new = record_of([sample(0, "robust")], version=1), record_of([sample(0, "robust")])
    assert from_text(old.to_text(), "here") == old
    assert old.identity != new.identity
    with pytest.raises(InputError, match="identity"):
        from_text(old.model_copy(update={"schema_version": 2}).to_text(), "here")


OUTCOMES = st.lists(st.sampled_from(["wrong", "robust", "broken"]), min_size=1, max_size=30)


@given(outcomes=OUTCOMES)
def test_a_record_survives_a_round_trip_and_its_aggregates_follow(outcomes):
    record = record_of([sample(i, o) for i, o in enumerate(outcomes)])
    again = from_text(record.to_text(), "here")
    assert again == record
    n = len(outcomes)
    assert again.robust_accuracy == outcomes.count("robust") / n
    assert again.clean_accuracy == (n - outcomes.count("wrong")) / n
    low, high = again.interval
    assert 0 <= low <= again.robust_accuracy <= high <= 1


@settings(max_examples=150)
@given(outcomes=OUTCOMES, place=st.floats(0, 1, exclude_max=True), value=st.integers(32, 126))
def test_any_edit_of_a_stored_file_is_detected(outcomes, place, value):
    text = record_of([sample(i, o) for i, o in enumerate(outcomes)]).to_text()
    i = int(place * len(text))
    edited = text[:i] + chr(value) + text[i + 1 :]
    if edited != text:
        with pytest.raises(InputError, match="edited"):
            from_text(edited, "here")


@given(outcomes=OUTCOMES, place=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_detected(outcomes, place):
    text = record_of([sample(i, o) for i, o in enumerate(outcomes)]).to_text()
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
    body = json.loads(record_of([sample(0, "robust"), sample(1, "broken")]).to_text())
    forgery(body)
    with pytest.raises(InputError):
        from_text(sealed(body), "here")


def sealed(body: dict) -> str:
    """An edited body as text, with a fresh closing hash."""
    body.pop("sha256")
    samples = body.pop("samples")
    head = json.dumps(body, indent=1, ensure_ascii=False)
    lines = ",\n".join(f"  {json.dumps(s)}" for s in samples)
    text = f'{head[:-2]},\n "samples": [\n{lines}\n ]'
    return f'{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def test_wilson_agrees_with_scipy():
    generator = random.Random(0)
    for _ in range(50):
        n = generator.randint(1, 2000)
        k = generator.randint(0, n)
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_writing_is_atomic_and_leaves_no_litter(tmp_path):
    record = record_of([sample(0, "robust")])
    record.save(tmp_path / "a" / "r.json")
    assert read_record(tmp_path / "a" / "r.json") == record
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.json"]


def test_a_directory_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(InputError, match="could not be written"):
        record_of([sample(0, "robust")]).save(tmp_path / "a" / "r.json")


def retrieval_record(ranks: list[tuple[int, int, int, int]]) -> Record:
    """A record of images with one caption each, from (image, attacked, caption, attacked)."""
    samples = []
    for i, (clean, attacked, caption, caption_attacked) in enumerate(ranks):
        outcome = "wrong" if clean > 1 else "broken" if attacked > 1 else "robust"
        made = sample(i, outcome).model_dump()
        made |= {"label": i, "prediction": (i + (clean > 1)) % len(ranks), "edit": None}
        made["ranks"] = Ranks(image=(clean, attacked), captions=((i, caption, caption_attacked),))
        samples.append(Sample(**made))
    return record_of(samples, task={"metric": "retrieval", "n_classes": len(ranks)})


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", 1e308), ("seconds", 1e300), ("model_seconds", 1e10)]
)
def test_seconds_that_add_up_to_infinity_are_refused(field, value):
    text = (
        record_of([sample(0, "robust")])
        .to_text()
        .replace('"seconds": ', f'"{field}": {value}, "x": ')
    )
    with pytest.raises(InputError, match=field):
        from_text(text, "here")


def test_a_count_beyond_what_adds_up_is_refused():
    text = record_of([sample(0, "robust")]).to_text()
    huge = re.sub(r'"forward": [0-9]+', f'"forward": {10**400}', text, count=1)
    assert huge != text
    with pytest.raises(InputError):
        from_text(huge, "here")


RANKS = st.integers(2, 12).flatmap(
    lambda n: st.lists(st.tuples(*[st.integers(1, n)] * 4), min_size=n, max_size=n)
)


@given(ranks=RANKS)
def test_recalls_follow_from_the_ranks_and_survive_a_round_trip(ranks):
    record = from_text(retrieval_record(ranks).to_text(), "here")
    recalls = record.results.recalls
    for place, k in enumerate((1, 5, 10)):
        n = len(ranks)
        assert recalls.image_to_text[place] == sum(r[0] <= k for r in ranks) / n
        attacked = sum(r[0] <= k and r[1] <= k for r in ranks) / n
        assert recalls.image_to_text_attacked[place] == attacked
        assert recalls.text_to_image[place] == sum(r[2] <= k for r in ranks) / n
        assert recalls.text_to_image_attacked[place] == sum(max(r[2:]) <= k for r in ranks) / n
    assert record.clean_accuracy == recalls.image_to_text[0]
    assert record.robust_accuracy == recalls.image_to_text_attacked[0]


RETRIEVAL_FORGERIES = {
    "a better recall": lambda body: body["results"]["recalls"].update(text_to_image=[1, 1, 1]),
    "no recalls": lambda body: body["results"].pop("recalls"),
    "a better rank": lambda body: body["samples"][0]["ranks"].update(image=[1, 1]),
    "a better rank of a caption": lambda body: body["samples"][2]["ranks"].update(
        captions=[[2, 1, 1]]
    ),
    "a caption less": lambda body: body["samples"][2]["ranks"].update(captions=[]),
    "another's caption": lambda body: body["samples"][2]["ranks"].update(captions=[[1, 2, 2]]),
    "a rank beyond the gallery": lambda body: body["samples"][1]["ranks"].update(image=[3, 9]),
    "no ranks": lambda body: body["samples"][1].pop("ranks"),
    "ranks of nothing": lambda body: body["samples"][1].update(ranks=None),
    "a rank of zero": lambda body: body["samples"][1]["ranks"].update(image=[0, 1]),
    "another metric": lambda body: body["task"].update(metric="zero-shot classification"),
}


@pytest.mark.parametrize("forgery", RETRIEVAL_FORGERIES.values(), ids=RETRIEVAL_FORGERIES)
def test_forged_ranks_are_refused(forgery):
    body = json.loads(retrieval_record([(1, 2, 1, 2), (3, 3, 1, 1), (1, 1, 2, 2)]).to_text())
    forgery(body)
    with pytest.raises(InputError):
        from_text(sealed(body), "here")


def text_record(edits: int = 1) -> Record:
    """A record of an attack on the text: one sample stands, one is broken by an edit."""
    broken = sample(1, "broken").model_copy(
        update={"edit": NameEdit(original="seven", adversarial="even")}
    )
    threat = {"norm": "levenshtein", "eps": f"{edits}/1", "parameters": {"edits": edits}}
    samples = [sample(0, "robust"), broken]
    return record_of(samples, attack=f"text-charmer-k{edits}", threat=threat)


def test_an_edit_survives_a_round_trip():
    record = text_record()
    assert from_text(record.to_text(), "here") == record
    assert record.samples[1].edit.distance == 1
    assert record.threat.ball == "levenshtein 1/1"


EDIT_FORGERIES = {
    "more edits": lambda body: body["samples"][1]["edit"].update(adversarial="eve"),
    "an edit of what stands": lambda body: body["samples"][0].update(
        edit={"original": "one", "adversarial": "on"}
    ),
    "no edit": lambda body: body["samples"][1].pop("edit"),
    "a long name": lambda body: body["samples"][1]["edit"].update(
        original="x" * 1001, adversarial="x" * 1001
    ),
    "an edit too many keys": lambda body: body["samples"][1]["edit"].update(k=1),
}


@pytest.mark.parametrize("forgery", EDIT_FORGERIES.values(), ids=EDIT_FORGERIES)
def test_forged_edits_are_refused(forgery):
    body = json.loads(text_record().to_text())
    forgery(body)
    with pytest.raises(InputError):
        from_text(sealed(body), "here")


@pytest.mark.parametrize("lengths", [(100_000, 100_000), (1000, 10)])
def test_names_that_take_long_to_compare_are_refused_unread(monkeypatch, lengths):
    def slow(one, other):
        raise AssertionError("the distance was computed")

    body = json.loads(text_record().to_text())
    names = dict(zip(("original", "adversarial"), ("x" * n for n in lengths), strict=True))
    body["samples"][1]["edit"] = names
    monkeypatch.setattr(edits, "levenshtein", slow)
    with pytest.raises(InputError):
        from_text(sealed(body), "here")


def test_no_edit_is_an_edit_of_distance_zero():
    samples = [sample(0, "robust"), sample(1, "broken")]
    edit = NameEdit(original="seven", adversarial="seven")
    samples[1] = samples[1].model_copy(update={"edit": edit})
    threat = {"norm": "levenshtein", "eps": "0/1", "parameters": {"edits": 0}}
    record = record_of(samples, attack="text-charmer-k0", threat=threat)
    assert from_text(record.to_text(), "here") == record


def test_a_radius_that_is_not_the_number_of_edits_is_refused():
    samples = text_record().samples
    threat = {"norm": "levenshtein", "eps": "2/1", "parameters": {"edits": 1}}
    with pytest.raises(ValueError, match="radius"):
        record_of(samples, threat=threat)
    with pytest.raises(ValueError, match="too many edits"):
        record_of(samples)


def test_what_only_some_records_have_is_not_written_in_the_others():
    text = record_of([sample(0, "robust"), sample(1, "broken")]).to_text()
    for word in ("ranks", "recalls", "edit"):
        assert word not in text
    # Written as null it is not the canonical text.
    body = json.loads(text)
    body["results"]["recalls"] = None
    with pytest.raises(InputError, match="edited"):
        from_text(sealed(body), "here")
