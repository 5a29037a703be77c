"""Commands that were only asked to read, or to write elsewhere, leave entries as they are."""

import json
import shutil
from pathlib import Path

import pytest

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import require_outside
from tests.conftest import REPOSITORY, Cli, assert_sentence
from tests.leaderboard.test_leaderboard import made

ENTRY = "leaderboard/entries/tiny-clip"


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """An entry in the leaderboard of the working directory, and a run."""
    (tmp_path / ENTRY).mkdir(parents=True)
    for name in ("card.json", "digits-v1.json"):
        shutil.copy(REPOSITORY / ENTRY / name, tmp_path / ENTRY / name)
    made("rb").save(tmp_path / "runs" / "r.json")
    return tmp_path / ENTRY


PLACES = [f"{ENTRY}/figures", f"{ENTRY}/a/b", ENTRY, "leaderboard/entries", f"{ENTRY}/../other"]
COMMANDS = [
    ["plot", "runs", "--out"],
    ["show", ENTRY, "--gallery", "--out"],
    ["run", "quick-v1", "--model", "tiny-clip", "--n", "1", "--out"],
    ["train", "digits/tecoa", "--out"],
    ["reproduce", "digits", "--out"],
    ["leaderboard", "--records", "runs", "--output"],
    ["submit", "runs", "--name", "x", "--adversarials"],
]


def contents(root: Path) -> set[Path]:
    return set(root.rglob("*"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_nothing_is_written_into_entries(command, place, entry, here: Cli, tmp_path):
    before = contents(tmp_path)
    assert_sentence(here(*command, place), "is in the leaderboard's entr", "choose a place outside")
    assert contents(tmp_path) == before


def test_figures_of_an_entry_leave_it_in_order(entry, here: Cli, tmp_path, monkeypatch):
    before = contents(entry)
    done = here("plot", ENTRY)
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / line for line in done.stdout.splitlines()]
    assert {path.parent for path in paths} == {tmp_path / "figures" / "tiny-clip"}
    assert all(path.is_file() for path in paths)
    # From within, too: the default lies in the working directory.
    monkeypatch.chdir(entry)
    assert_sentence(here("plot", "."), "is in the leaderboard's entry")
    assert_sentence(here("show", ".", "--gallery"), "is in the leaderboard's entry")
    assert contents(entry) == before


def test_a_link_into_an_entry_is_seen_through(entry, tmp_path):
    (tmp_path / "link").symlink_to(entry)
    with pytest.raises(InputError, match="is in the leaderboard's entry"):
        require_outside(tmp_path / "link" / "figures")


def test_an_entry_beside_ones_own_work_is_in_nobodys_way(entry, tmp_path, here, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(entry, work / "tiny-clip")
    monkeypatch.chdir(work)
    assert here("plot", "tiny-clip").returncode == 0
    assert require_outside(Path("runs")) == Path("runs")
    monkeypatch.chdir(entry.parent)
    for place in ("runs", "figures/x"):
        with pytest.raises(InputError, match="is in the leaderboard's entries"):
            require_outside(Path(place))
    monkeypatch.chdir(tmp_path)
    entry.parent.rename("board")
    with pytest.raises(InputError, match="is in the leaderboard's entries"):
        require_outside(Path("board/figures"))


def test_a_checkpoint_is_no_entry(tmp_path):
    """Its card is of another kind; beside it there is room for anything."""
    folder = tmp_path / "runs" / "student"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps({"recipe_digest": "0" * 64}))
    for place in ("runs/figures", "runs/student/figures", "runs"):
        assert require_outside(tmp_path / place) == tmp_path / place


def test_what_lies_in_an_entry_already_is_named_with_what_to_do(entry, here: Cli):
    (entry / "figures").mkdir()
    assert_sentence(here("leaderboard"), "figures is not a plain file", "Remove it")
    made("rb").save(Path("one.json"))
    done = here("submit", "one.json", "--name", "tiny-clip", "--weights", "tiny-clip")
    assert_sentence(done, f"{ENTRY}/figures is not a plain file", "Remove it")


def test_a_leaderboard_of_other_records_is_printed_alone(entry, here: Cli, tmp_path):
    before = contents(tmp_path)
    done = here("leaderboard", "--records", "runs")
    assert done.returncode == 0, done.stderr
    assert "# Leaderboard" in done.stdout
    for option in ("--html", "--check", "--open"):
        assert_sentence(here("leaderboard", "--records", "runs", option), "--output FILE.md")
    assert contents(tmp_path) == before
    done = here("leaderboard", "--records", "runs", "--output", "out/board.md", "--html")
    assert "written: out/board.md, out/index.html" in done.stderr
    assert here("leaderboard").returncode == 0
    assert (tmp_path / "leaderboard" / "README.md").is_file()
