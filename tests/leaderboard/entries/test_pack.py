"""Records in one file: what is packed comes back, and anything else is a sentence."""

import json

import pytest
from hypothesis import assume, given, settings, strategies as st

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.pack import pack, unpack
from mmtard_bench.records.edits import NameEdit
from mmtard_bench.records.schema import Record
from tests.leaderboard.test_leaderboard import in_suite, made
from tests.records.test_records import RANKS, record_of, retrieval_record, sample

STAGES = ["apgd-ce", "apgd-t", "square", "fab-t"]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def columns(draw: st.DrawFn, n: int) -> list[object]:
    """Samples whose verdicts, stages, edits and passes are arbitrary."""
    samples = []
    for number in range(n):
        outcome = draw(st.sampled_from(["wrong", "robust", "broken"]))
        changes = {"forward": draw(st.integers(0, 10**6)), "backward": draw(st.integers(0, 99))}
        if outcome == "broken":
            changes["broken_by"] = draw(st.sampled_from(STAGES))
            changes["unconfirmed"] = draw(st.booleans())
            if draw(st.booleans()):
                name = draw(NAMES)
                changes["edit"] = NameEdit(original=name, adversarial=name + draw(NAMES)[:1])
        samples.append(sample(number, outcome).model_copy(update=changes))
    return samples


@st.composite
def runs(draw: st.DrawFn) -> list[Record]:
    """Records of one suite that share their samples, of pixels and names together."""
    n, count = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    threat = {"parameters": {"edits": 1}}
    return [
        in_suite(record_of(draw(columns(n)), "m", f"pgd-{i + 1}", threat=threat), count)
        for i in range(count)
    ]


@given(records=runs())
def test_packed_records_come_back(records):
    text = pack(records)
    assert unpack(text, "here") == records
    assert pack(unpack(text, "here")) == text


@given(ranks=RANKS)
def test_ranks_come_back(ranks):
    record = in_suite(retrieval_record(ranks))
    assert unpack(pack([record]), "here") == [record]


@settings(max_examples=150)
@given(records=runs(), place=st.floats(0, 1, exclude_max=True), value=st.integers(32, 126))
def test_a_changed_character_is_refused(records, place, value):
    text = pack(records)
    i = int(place * len(text))
    assume(text[i] != chr(value))
    with pytest.raises(InputError, match="edited or cut short"):
        unpack(text[:i] + chr(value) + text[i + 1 :], "here")


@given(records=runs(), place=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_refused(records, place):
    text = pack(records)
    with pytest.raises(InputError, match="edited or cut short"):
        unpack(text[: int(place * len(text))], "here")


@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    )
)
def test_other_json_is_refused(body):
    if isinstance(body, dict):
        body |= {"pack_version": 1, "sha256": ""}
    with pytest.raises(InputError, match="no records at all"):
        unpack(json.dumps(body), "here")


def test_deep_json_is_refused():
    with pytest.raises(InputError, match="no records at all"):
        unpack("[" * 100_000, "here")


def test_samples_of_two_tasks_with_other_labels_are_refused():
    one = made("rr", records=2)
    label = [s.model_copy(update={"label": 2, "prediction": 2}) for s in one.samples]
    with pytest.raises(InputError, match="other labels"):
        pack([one, one.model_copy(update={"samples": label})])
