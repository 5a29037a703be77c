"""Which entries a git branch adds or changes, and what such a branch must not change.

File names come from strangers. They are data here and never part of a command line. A branch of a
stranger is read from git's objects: it is never checked out, and none of its code runs.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import LARGEST, require_name

BOARD = "leaderboard"
_STUDENTS = f"{BOARD}/students/"
_MADE = re.compile(r"README\.md|index\.html|[A-Za-z0-9.+-]+-scatter\.svg")
"""The files that ``mmtard-bench leaderboard`` writes and checks."""
_ASK = "Leave that to the maintainers, and open an issue if it is wrong."


def changed_entries(base: str, folder: Path = Path(), *, branch: str = "HEAD") -> dict[str, str]:
    """The entries that the commits of ``branch`` since ``base`` add or change.

    Args:
        base: A git revision.
        branch: Another one; default: what is checked out.
        folder: The checkout; default: the current directory.

    Returns:
        "added" or "changed" by the name of the entry.

    Raises:
        InputError: If git does not know the revision; if the branch removes a file of an entry; if
            it changes a leaderboard file that only maintainers write (breaks, verified levels); if
            it changes entries and code together, since the code could be what checks them; or if
            the leaderboard of the branch has a link, a program or a file that is too large.
    """
    for revision in (base, branch):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/@~^-]*", revision):
            raise InputError(
                f"{revision!r} is not a git revision; expected one such as origin/main."
            )
    fork = _git(folder, "merge-base", base, branch).decode().strip()
    _board_files(folder, branch)
    found: dict[str, str] = {}
    others = []
    for status, path in _changes(folder, fork, branch):
        kind, *rest = path.split("/")
        if kind != BOARD:
            others.append(path)
        elif rest and rest[0] == "entries":
            name = _entry_of(status, path, rest[1:])
            there = _git(folder, "ls-tree", "--name-only", fork, "--", f"{BOARD}/entries/{name}")
            found[name] = "changed" if there else "added"
        elif len(rest) != 1 or not _MADE.fullmatch(rest[0]) or status == "D":
            raise InputError(_why_not(status, path, rest))
    if found and others:
        raise InputError(
            f"The branch changes the entry '{min(found)}' and also {others[0]!r}. An entry comes "
            f"without code, since the code could be what checks it. Commit {BOARD}/ alone."
        )
    return dict(sorted(found.items()))


def export_board(branch: str, into: Path, folder: Path = Path()) -> None:
    """Write the leaderboard of a git revision below a directory, without the students.

    Raises InputError as ``changed_entries`` does.
    """
    for name, path in _board_files(folder, branch):
        if path.startswith(_STUDENTS):
            continue
        file = into / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_git(folder, "cat-file", "blob", name))


def _board_files(folder: Path, revision: str) -> list[tuple[str, str]]:
    """(object, path) of every file of a leaderboard. Raises InputError unless all are plain."""
    out = _git(folder, "ls-tree", "-r", "-z", "-l", revision, "--", BOARD)
    found = []
    for line in os.fsdecode(out).split("\0")[:-1]:
        facts, path = line.split("\t", 1)
        mode, _, name, size = facts.split()
        if mode != "100644":
            raise InputError(
                f"{path!r} is a link, a program or another repository (mode {mode}); the "
                "leaderboard has plain files (mode 100644) alone. Remove it, or chmod 644."
            )
        if int(size) > LARGEST and not path.startswith(_STUDENTS):
            raise InputError(
                f"{path!r} has {int(size):,} bytes; files of the leaderboard have at most "
                f"{LARGEST:,}. Adversarial images stay elsewhere."
            )
        found.append((name, path))
    return found


def _why_not(status: str, path: str, rest: list[str]) -> str:
    if rest and rest[0] == "breaks" and status == "A":
        return (
            f"The change adds {path}. A maintainer replays the images with mmtard-bench break and "
            "commits the result."
        )
    what = {"A": "adds", "D": "removes"}.get(status, "changes")
    return f"The change {what} {path!r}. {_ASK}"


def _entry_of(status: str, path: str, rest: list[str]) -> str:
    if len(rest) != 2:
        raise InputError(f"{path!r} is not a file of an entry; expected {BOARD}/entries/NAME/FILE.")
    name = require_name(rest[0])
    if status == "D":
        raise InputError(f"The change removes {path} of the entry '{name}'. {_ASK}")
    return name


def _changes(folder: Path, fork: str, branch: str) -> Iterator[tuple[str, str]]:
    """(status, path) of every file that differs; a rename gives two."""
    options = ("--name-status", "-z", "--no-renames", "--relative", "--no-ext-diff")
    out = _git(folder, "diff", *options, fork, branch, "--", ".")
    fields = iter(os.fsdecode(out).split("\0")[:-1])
    return zip(fields, fields, strict=True)


def _git(folder: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    except OSError as error:
        raise InputError(
            f"git cannot be run: {error}. It is needed to find what a branch changes."
        ) from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise InputError(f"git {arguments[0]} failed in {folder.resolve()}: {said}")
    return done.stdout
