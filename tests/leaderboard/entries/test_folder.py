"""Entries as directories of strangers' files: names, kinds and sizes, before contents."""

import os
from pathlib import Path

import pytest

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries import folder as folders
from mmtard_bench.leaderboard.entries.card import Card, card_to_text
from mmtard_bench.leaderboard.entries.folder import read_entries, read_entry, require_name
from mmtard_bench.leaderboard.entries.pack import pack
from mmtard_bench.leaderboard.entries.submit import submit
from mmtard_bench.leaderboard.entries.text import skeleton
from mmtard_bench.records.schema import Record
from tests.conftest import REPOSITORY
from tests.leaderboard.test_leaderboard import in_suite, made


def entry_at(root: Path, *records: Record, name: str = "my-clip", **changes: object) -> Path:
    """An entry with a card that fits its records, but for ``changes``."""
    records = records or (made("rb"),)
    facts = {"name": name, "source": "tiny-clip"}
    named = [
        in_suite(r, r.suite.records, model=r.model.model_copy(update=facts), suite=r.suite)
        for r in records
    ]
    card = Card(**{"name": name, "weights": "tiny-clip", "digest": "d", "parameters": 3, **changes})
    place = root / name
    place.mkdir(parents=True)
    (place / "card.json").write_text(card_to_text(card), "utf-8")
    (place / f"{named[0].suite.name}.json").write_text(pack(named), "utf-8")
    return place


def test_an_entry_is_read(tmp_path):
    entry = read_entry(entry_at(tmp_path))
    assert [record.robust_accuracy for record in entry.records] == [0.5]
    assert read_entries(tmp_path) == [entry]


NO_NAMES = ["..", ".", "", "../x", "a/b", "a\\b", "/etc", "My-Clip", "my clip", "-x", "x-", "a--b"]
NO_NAMES += [".x", "my-cl\u0131p", "my-\u0441lip", "x" * 65, "a\n", "a\x00b", "con:", "\uff41"]


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_a_name_is_no_path_and_plain(name, tmp_path):
    with pytest.raises(InputError, match="cannot be the name of an entry"):
        require_name(name)
    with pytest.raises(InputError, match="cannot be the name of an entry"):
        submit([made("rb")], name=name, facts={"weights": "tiny-clip"}, root=tmp_path / "entries")
    assert list(tmp_path.iterdir()) == []


ALIKE = [("my-clip", "my_clip"), ("clip-l", "clip-1"), ("robust", "r0bust"), ("mmt", "rnmt")]
ALIKE += [("vit-s", "vit-5"), ("w", "vv"), ("myclip", "my.clip"), ("b16", "816")]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_names_that_look_alike_are_refused(one, other, tmp_path):
    assert skeleton(one) == skeleton(other)
    entry_at(tmp_path, name=one)
    entry_at(tmp_path, name=other)
    with pytest.raises(InputError, match="look alike"):
        read_entries(tmp_path)


def test_names_that_differ_are_not_alike():
    names = [path.name for path in (REPOSITORY / "leaderboard" / "entries").iterdir()]
    assert len(set(map(skeleton, names))) == len(names)


def link(place):
    (place / "other-v1.json").symlink_to("/etc/passwd")


def linked_card(place):
    (place / "card.json").rename(place.parent / "card")
    (place / "card.json").symlink_to(place.parent / "card")


SPOILED = {
    "a link": (link, "not a plain file"),
    "a linked card": (linked_card, "not a plain file"),
    "a directory": (lambda place: (place / "x-v1.json").mkdir(), "not a plain file"),
    "a pipe": (lambda place: os.mkfifo(place / "x-v1.json"), "not a plain file"),
    "another file": (lambda place: (place / "run.py").write_text(""), "does not belong"),
    "a hidden file": (lambda place: (place / ".x").write_text(""), "does not belong"),
    "no suite's name": (lambda place: (place / "Quick-v1.json").write_text(""), "does not belong"),
    "no records": (lambda place: (place / "quick-v1.json").unlink(), "has no records"),
    "no card": (lambda place: (place / "card.json").unlink(), "There is no file"),
    "no text": (lambda place: (place / "card.json").write_bytes(b"\xff"), "cannot be read"),
    "another suite": (
        lambda place: (place / "quick-v1.json").rename(place / "slow-v1.json"),
        "of another suite than slow-v1",
    ),
    "many files": (
        lambda place: [(place / f"x-v{i}.json").write_text("") for i in range(80)],
        "has 82 files",
    ),
}


@pytest.mark.parametrize(("spoil", "why"), SPOILED.values(), ids=SPOILED)
def test_an_entry_with_anything_else_in_it_is_refused(spoil, why, tmp_path):
    place = entry_at(tmp_path)
    spoil(place)
    with pytest.raises(InputError, match=why):
        read_entry(place)


def test_a_large_file_is_refused_unread(tmp_path, monkeypatch):
    place = entry_at(tmp_path)
    with (place / "quick-v1.json").open("wb") as file:
        file.truncate(2 * 2**30)
    monkeypatch.setattr(folders, "_text", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(InputError, match="2,147,483,648 bytes"):
        read_entry(place)


def test_two_records_for_one_place_are_refused(tmp_path):
    later = in_suite(made("rr"), 1).model_copy(update={"created": "2027"})
    with pytest.raises(InputError, match="two records for one task"):
        read_entry(entry_at(tmp_path, made("rb"), later))


@pytest.mark.parametrize(
    "changes", [{"digest": "e"}, {"weights": "tiny-tecoa"}, {"parameters": 4}], ids=str
)
def test_records_of_another_model_are_refused(changes, tmp_path):
    with pytest.raises(InputError, match="another model than its card"):
        read_entry(entry_at(tmp_path, **changes))


def test_an_entry_in_anothers_directory_is_refused(tmp_path):
    place = entry_at(tmp_path)
    with pytest.raises(InputError, match="is of 'my-clip'; expected 'other'"):
        read_entry(place.rename(tmp_path / "other"))


@pytest.mark.parametrize("spoil", [lambda p: p.write_text(""), lambda p: p.symlink_to(".")])
def test_the_directory_of_entries_has_nothing_else(spoil, tmp_path):
    entry_at(tmp_path)
    spoil(tmp_path / "other")
    with pytest.raises(InputError, match="not an entry's directory"):
        read_entries(tmp_path)
