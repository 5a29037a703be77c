"""From a run to an entry: whole runs only, and nothing is written that will not be read."""

import errno
import os
import shlex
from pathlib import Path

import pytest

from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.leaderboard.entries.submit import submit
from mmtard_bench.records.schema import Record, SuiteFacts
from tests.conftest import Cli, assert_sentence
from tests.leaderboard.test_leaderboard import in_suite, made
from tests.records.test_records import record_of, sample

SUITE = """
name = "tiny-v1"
description = "two samples"
n = 2
seed = 0
tasks = ["digits/digit"]
[[threats]]
attack = "pgd-2"
norm = "linf"
eps = "8/255"
"""


def test_a_run_is_submitted_and_its_card_stays(here: Cli, tmp_path):
    (tmp_path / "tiny-v1.toml").write_text(SUITE)
    assert here("run", "tiny-v1.toml", "--model", "tiny-clip", "--batch-size", "2").returncode == 0
    run = ("submit", "runs/tiny-v1", "--name", "my-clip")
    done = here(*run, "--paper", "https://a.org/1", "--set", "authors=A. One; B. Two")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "leaderboard" / "entries" / "my-clip"
    assert sorted(path.name for path in place.iterdir()) == ["card.json", "tiny-v1.json"]
    assert "the card does not say: code, architecture" in done.stdout
    assert done.stdout.endswith("then: mmtard-bench leaderboard\n")
    card = read_entry(place).card
    assert (card.authors, card.weights) == (["A. One", "B. Two"], "tiny-clip")
    assert {record.model.name for record in read_entry(place).records} == {"my-clip"}
    again = here(*run, "--set", "licence=MIT")
    assert again.returncode == 0, again.stderr
    assert read_entry(place).card == card.model_copy(update={"licence": "MIT"})
    assert_sentence(here(*run, "--set", "rank=1"), "the key 'rank' is unknown")
    assert_sentence(here(*run, "--set", "licence"), "expected KEY=VALUE")
    assert_sentence(here(*run, "--set", "contact=<me>"), "U+003C is not allowed")
    assert read_entry(place).card.licence == "MIT"
    # What it says to do next can be done as it is printed.
    done = here(*run, "--entries", "my board/entries")
    for line in done.stdout.splitlines()[-2:]:
        words = shlex.split(line.partition(": mmtard-bench ")[2])
        assert "my board/" in line
        if words[0] == "leaderboard":
            assert here(*words).returncode == 0
    assert (tmp_path / "my board" / "README.md").is_file()
    # Beside a run's directories an entry, and they beside it, would be refused.
    assert_sentence(here(*run, "--entries", "runs"), "runs holds 'tiny-v1', which is no entry")


def test_a_limited_run_is_refused(here: Cli, tmp_path):
    (tmp_path / "tiny-v1.toml").write_text(SUITE)
    limited = ("--n", "1", "--batch-size", "1")
    assert here("run", "tiny-v1.toml", "--model", "tiny-clip", *limited).returncode == 0
    assert_sentence(here("submit", "runs", "--name", "x"), "of tiny-v1+n1", "without --n")
    assert not (tmp_path / "leaderboard").exists()


def submitted(tmp_path, *records: Record, name: str = "my-clip", **facts: str):
    return submit(records, name=name, facts={"weights": "tiny-clip", **facts}, root=tmp_path / "e")


FAILED = {"status": "error", "error": "broke", "results": None, "samples": []}
REFUSED = {
    "a record is missing": ([made("rb", records=2)], "lacks records"),
    "a record failed": ([made("rb", **FAILED)], "records that failed"),
    "two models": (
        [
            made("rb"),
            in_suite(made("rb"), model=made("r").model.model_copy(update={"digest": "e"})),
        ],
        "of 2 models",
    ),
    "none": ([], "of 0 models"),
    "no suite": ([record_of([sample(0, "robust")])], "no suite"),
    "no suite's name": (
        [made("rb", suite=SuiteFacts(name="quick", protocol=None, digest="1" * 64, records=1))],
        "does not belong",
    ),
}


@pytest.mark.parametrize(("records", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_an_entry_writes_nothing(records, why, tmp_path):
    with pytest.raises(InputError, match=why):
        submitted(tmp_path, *records)
    assert not (tmp_path / "e").exists()


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_name_like_anothers_leaves_nothing_behind(tmp_path):
    submitted(tmp_path, made("rb"))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="'my-clip' and 'my_c1ip' look alike"):
        submitted(tmp_path, made("rb"), name="my_c1ip")
    assert contents(tmp_path) == before
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["my-clip"]


def test_new_weights_need_every_suite_again(tmp_path):
    other = SuiteFacts(name="other-v1", protocol=None, digest="2" * 64, records=1)
    submitted(tmp_path, made("rb"), made("rb", suite=other), licence="MIT")
    before = contents(tmp_path)
    new = [
        in_suite(r, suite=r.suite, model=r.model.model_copy(update={"digest": "e"}))
        for r in (made("rr"), made("rr", suite=other))
    ]
    with pytest.raises(InputError, match=r"e/my-clip/other-v1.json has a record of another model"):
        submitted(tmp_path, new[0])
    assert contents(tmp_path) == before
    entry, written = submitted(tmp_path, *new)
    assert [path.name for path in written] == ["card.json", "other-v1.json", "quick-v1.json"]
    # What was said of the old weights may not hold of the new.
    assert (entry.card.digest, entry.card.licence) == ("e", None)


def test_the_newest_record_of_a_place_counts(tmp_path):
    old, new = (
        made(text).model_copy(update={"created": when})
        # As text the older one is the larger.
        for text, when in (("rr", "2026-11-24T09:00:00+05:00"), ("rb", "2026-11-24T05:00:00+00:00"))
    )
    entry, _ = submitted(tmp_path, new, old)
    assert [record.robust_accuracy for record in entry.records] == [0.5]
    assert dict(entry.records[0].model)["source"] == "tiny-clip"


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_full_disk_leaves_everything_as_it_was(written, before, tmp_path, monkeypatch):
    """Each file in turn is the one for which there is no space."""
    if before:
        submitted(tmp_path, made("rr"), licence="MIT")
    there, left = contents(tmp_path), [written]
    real = os.fsync

    def full(handle):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    other = SuiteFacts(name="other-v1", protocol=None, digest="2" * 64, records=1)
    with pytest.raises(StorageError, match=r"e/my-clip/.* could not be written: No space left"):
        submitted(tmp_path, made("rb"), made("rb", suite=other))
    assert contents(tmp_path) == there
    assert (tmp_path / "e").exists() == bool(before)


@pytest.mark.parametrize("renamed", [0, 1])
def test_an_entry_that_cannot_take_its_place_leaves_the_earlier_one(renamed, tmp_path, monkeypatch):
    submitted(tmp_path, made("rr"), licence="MIT")
    there, left, real = contents(tmp_path), [renamed], Path.rename

    def rename(path, target):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match="Nothing was changed"):
        submitted(tmp_path, made("rb"))
    assert contents(tmp_path) == there


def test_records_of_older_data_make_no_entry(tmp_path):
    task = made("rb").task.model_copy(update={"revision": "new"})
    old = [made("rb", attack=f"pgd-{i}", records=2, created="2026-11-24") for i in (1, 2)]
    new = [
        made("rr", attack=f"pgd-{i}", records=2, task=task, created="2026-11-25") for i in (1, 2)
    ]
    with pytest.raises(InputError, match="are of older data; run the suite again"):
        submitted(tmp_path, *old, new[0])
    entry, _ = submitted(tmp_path, *old, *new)
    assert {record.task.revision for record in entry.records} == {"new"}
