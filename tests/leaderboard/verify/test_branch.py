"""What a branch changes is read off git, and its file names are data."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.breaks import Break, Fallen, read_breaks
from mmtard_bench.leaderboard.entries.folder import LARGEST
from mmtard_bench.leaderboard.entries.verifications import (
    Verification,
    read_verifications,
    verifications_to_text,
)
from mmtard_bench.leaderboard.verify.branch import changed_entries
from tests.conftest import REPOSITORY, Cli, assert_sentence

BOARD = Path("leaderboard")


class Repository:
    """A repository with a leaderboard of one entry on main, and a branch that is checked out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "-q", "-b", "main")
        self.write("entries/old/card.json", "{}")
        self.write("entries/old/quick-v1.json", "1")
        self.write("breaks/old--me.json", "1")
        self.write("verification.json", verifications_to_text([verified("old")]))
        self.write("README.md", "")
        self.commit()
        self.git("checkout", "-q", "-b", "mine")

    def git(self, *arguments: str) -> None:
        quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(
            ["git", *who, *arguments], cwd=self.root, check=True, env={**os.environ, **quiet}
        )

    def path(self, name: str) -> Path:
        return self.root / BOARD / name

    def write(self, name: str, text: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "change")

    def changed(self, base: str = "main") -> dict[str, str]:
        return changed_entries(base, self.root)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def verified(entry: str, by: str = "me") -> Verification:
    return Verification(
        entry=entry,
        suite="quick-v1",
        records="0" * 64,
        level="well-formed",
        date="2026-11-24",
        version="1",
        by=by,
        detail="x",
    )


def test_entries_that_are_new_or_changed(repository):
    assert repository.changed() == {}
    repository.write("entries/new/card.json", "{}")
    repository.write("entries/old/quick-v1.json", "2")
    for name in ("README.md", "index.html", "quick-v1-scatter.svg"):
        repository.write(name, "new")
    repository.commit()
    assert repository.changed() == {"new": "added", "old": "changed"}


def test_code_alone_is_no_entry_and_an_entry_comes_without_code(repository):
    repository.write("../mmtard_bench/x.py", "")
    repository.commit()
    assert repository.changed() == {}
    repository.write("entries/new/card.json", "{}")
    repository.commit()
    with pytest.raises(InputError, match=r"the entry 'new' and also 'mmtard_bench/x.py'"):
        repository.changed()


def test_what_main_did_meanwhile_is_not_the_branchs(repository):
    repository.write("entries/new/card.json", "{}")
    repository.commit()
    repository.git("checkout", "-q", "main")
    repository.write("entries/other/card.json", "{}")
    repository.path("breaks/old--me.json").unlink()
    repository.commit()
    repository.git("checkout", "-q", "mine")
    assert repository.changed() == {"new": "added"}


@pytest.mark.parametrize(
    "name", ["entries/old/quick-v1.json", "breaks/old--me.json", "verification.json", "README.md"]
)
def test_nothing_is_removed_silently(repository, name):
    repository.path(name).unlink()
    repository.commit()
    with pytest.raises(InputError, match=rf"removes '?leaderboard/{name}.*maintainers"):
        repository.changed()


def test_an_entry_under_another_name_removes_the_old_one(repository):
    repository.path("entries/old").rename(repository.path("entries/young"))
    repository.commit()
    with pytest.raises(InputError, match=r"removes leaderboard/entries/old/card.json of the entry"):
        repository.changed()


@pytest.mark.parametrize(
    "name",
    ["verification.json", "breaks/old--me.json", "reported.csv", "evil.html", "card.schema.json"],
)
def test_what_no_submitter_may_write_is_left_to_the_maintainers(repository, name):
    repository.write(name, "forged")
    repository.commit()
    with pytest.raises(InputError, match=rf"(adds|changes) 'leaderboard/{name}'.*maintainers"):
        repository.changed()


def test_a_break_waits_for_a_maintainer_who_replays_it(repository):
    repository.write("breaks/old--you.json", "{}")
    repository.commit()
    with pytest.raises(
        InputError, match=r"A maintainer replays the images with mmtard-bench break"
    ):
        repository.changed()


def test_a_break_is_of_the_entry_in_its_name(tmp_path):
    fallen = Fallen(task="t", norm="linf", eps="8/255", surface="native", ids=["s/0"])
    facts = {"suite": "quick-v1", "by": "me", "paper": None, "date": "2026-11-24"}
    digests = {"model": "0" * 64, "adversarials": "0" * 64, "images": None}
    one = Break(entry="mine", fallen=[fallen], **facts, **digests)
    (tmp_path / "mine--me.json").write_text(one.model_dump_json())
    assert read_breaks(tmp_path) == [one]
    (tmp_path / "mine--me.json").rename(tmp_path / "other--me.json")
    with pytest.raises(InputError, match="is of 'mine'; expected that in its name"):
        read_breaks(tmp_path)


NAMES = ["entries/x", "entries/a/b/c.json", "entries/Up/card.json", "entries/a b/card.json"]
NAMES += ["entries/--help/card.json", "entries/$(id)/card.json", "entries/a\nb/card.json"]
NAMES += ["entries/\x1b[2J/card.json", "entries/\u0430/card.json"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_what_is_no_entry_is_refused(repository, name):
    repository.write(name, "{}")
    repository.commit()
    with pytest.raises(InputError, match=r"not a file of an entry|cannot be the name of an entry"):
        repository.changed()


def test_a_name_that_is_no_text_is_a_sentence(repository):
    place = os.fsencode(repository.path("entries")) + b"/\xff"
    Path(os.fsdecode(place)).mkdir()
    (Path(os.fsdecode(place)) / "card.json").write_text("{}")
    repository.commit()
    with pytest.raises(InputError, match="cannot be the name"):
        repository.changed()


@pytest.mark.parametrize("what", ["entries", "breaks", "."])
def test_a_directory_that_became_a_file(repository, what):
    repository.git("rm", "-rq", str(BOARD / what))
    repository.root.joinpath(BOARD / what).parent.mkdir(exist_ok=True)
    repository.root.joinpath(BOARD / what).write_text("")
    repository.commit()
    with pytest.raises(InputError):
        repository.changed()


@pytest.mark.parametrize("base", ["--output=x", "-h", "", "a b", "$(id)", "x:y"])
def test_a_base_is_a_revision(repository, base):
    with pytest.raises(InputError, match="not a git revision"):
        repository.changed(base)


def test_an_unknown_base_and_no_repository_are_sentences(repository, tmp_path_factory, monkeypatch):
    with pytest.raises(InputError, match=r"git merge-base failed in .*Not a valid object name"):
        repository.changed("origin/gone")
    outside = tmp_path_factory.mktemp("outside")
    with pytest.raises(InputError, match="not a git repository"):
        changed_entries("main", outside)
    monkeypatch.setenv("PATH", str(outside))
    with pytest.raises(InputError, match="git cannot be run"):
        repository.changed()


@pytest.mark.parametrize("name", ["README.md", "index.html", "entries/old/quick-v1.json"])
def test_a_link_is_no_file_of_the_leaderboard(repository, name):
    repository.path(name).unlink(missing_ok=True)
    repository.path(name).symlink_to("/etc/hostname")
    repository.commit()
    with pytest.raises(InputError, match=rf"'leaderboard/{name}' is a link.*120000"):
        repository.changed()


def test_a_program_and_a_file_that_is_too_large_are_refused(repository):
    repository.write("entries/new/card.json", "{}")
    repository.path("entries/new/card.json").chmod(0o755)
    repository.commit()
    with pytest.raises(InputError, match=r"a program.*mode 100755"):
        repository.changed()
    repository.path("entries/new/card.json").chmod(0o644)
    repository.write("entries/new/quick-v1.json", " " * (LARGEST + 1))
    repository.commit()
    with pytest.raises(InputError, match="16,777,217 bytes"):
        repository.changed()


def test_a_branch_is_verified_without_being_checked_out(here: Cli, tmp_path):
    """Its tables are compared with its records, and a plot of no suite is refused."""
    repository = Repository(tmp_path)
    repository.git("rm", "-rq", str(BOARD))
    repository.commit()
    repository.git("branch", "-f", "main")
    shutil.copytree(REPOSITORY / BOARD / "entries/tiny-clip", repository.path("entries/tiny-clip"))
    assert here("leaderboard", "--html").returncode == 0
    check = ("verify", "--since", "main", "--branch", "mine", "--level", "well-formed")

    def checked():
        repository.commit()
        repository.git("checkout", "-q", "main")
        assert not repository.path("README.md").exists()
        done = here(*check)
        repository.git("checkout", "-q", "mine")
        return done

    done = checked()
    assert (done.returncode, done.stderr) == (0, "")
    assert "tiny-clip: well-formed" in done.stdout
    repository.write("evil-v1-scatter.svg", "<svg><script>alert(1)</script></svg>")
    done = checked()
    assert done.returncode == 1
    assert "leaderboard/evil-v1-scatter.svg belongs to no suite; remove it." in done.stderr
    repository.path("evil-v1-scatter.svg").unlink()
    repository.write("README.md", "another")
    assert "leaderboard/README.md is stale" in checked().stderr
    assert_sentence(here("verify", "--since", "main", "--branch", "x:y"), "not a git revision")
    assert_sentence(here("verify", "x", "--branch", "mine"), "--branch goes with --since")


@pytest.mark.parametrize("date", ["2026-19-39", "20261125", "tomorrow"])
def test_verifications_that_cannot_be_read_are_a_sentence(tmp_path, date):
    path = tmp_path / "verification.json"
    path.write_text(verifications_to_text([verified("old")]).replace("2026-11-24", date))
    with pytest.raises(InputError, match=r"The verifications in .* are not valid: .*date"):
        read_verifications(path)


def test_a_break_that_is_no_plain_file_or_too_large_is_refused(tmp_path):
    path = tmp_path / "old--me.json"
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is not a plain file"):
        read_breaks(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(InputError, match="2,147,483,648 bytes"):
        read_breaks(tmp_path)


def test_since_through_the_command_line(here: Cli, tmp_path):
    repository = Repository(tmp_path)
    done = here("verify", "--since", "main")
    assert (done.returncode, done.stdout) == (0, "no entry was added or changed since main\n")
    repository.write("entries/new/card.json", "{}")
    repository.commit()
    done = here("verify", "--since", "main", "--level", "well-formed")
    assert_sentence(done, "leaderboard/entries/new is refused", "card.json is not valid")
    assert_sentence(here("verify"), "Name directories of entries, or --since BASE")
    assert_sentence(here("verify", "x", "--since", "main"), "or --since BASE")
    assert_sentence(here("verify", "--since=--output=x"), "is not a git revision")
