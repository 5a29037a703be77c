"""Which entries a branch adds or changes, by git, and what it may not do along with that.

Names of files come from strangers: they are data here, never part of a command line.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mmtard_bench.entries.checked import verifications_from
from mmtard_bench.entries.folder import require_name
from mmtard_bench.errors import InputError

BOARD = "leaderboard"
_VERIFICATIONS = f"{BOARD}/verification.json"
_ASK = "Leave that to the maintainers, and open an issue if it is wrong."


def changed_entries(base: str, folder: Path = Path()) -> list[str]:
    """The names of the entries that commits since ``base`` add or change, in the checkout there.

    Raises InputError for a revision that git does not know; for what is no part of an entry; and
    for a change that removes records of an entry or somebody's break, or that verifies or breaks
    an entry which it changes as well.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/@~^-]*", base):
        raise InputError(f"{base!r} is no revision; expected one such as origin/main.")
    fork = _git(folder, "merge-base", base, "HEAD").decode().strip()
    names: set[str] = set()
    broken: dict[str, str] = {}
    for status, path in _changes(folder, fork):
        kind, *rest = path.removeprefix(f"{BOARD}/").split("/")
        if kind == "entries":
            names.add(_entry_of(status, path, rest))
        elif kind == "breaks":
            if status == "D":
                raise InputError(f"The change removes {path}: somebody broke an entry. {_ASK}")
            # A break's file is ENTRY--WHO.json, and an entry's name has no "--".
            broken[Path(path).name.partition("--")[0]] = path
    for name in sorted(names & {*broken, *_verified_anew(folder, fork)}):
        path = broken.get(name, _VERIFICATIONS)
        raise InputError(
            f"The change is to the entry '{name}', and to what {path} says about it; an entry is "
            "not judged by who submits it. Make two pull requests."
        )
    return sorted(names)


def _entry_of(status: str, path: str, rest: list[str]) -> str:
    if len(rest) != 2:
        raise InputError(f"{path!r} is no file of an entry; expected {BOARD}/entries/NAME/FILE.")
    name = require_name(rest[0])
    if status == "D":
        raise InputError(f"The change removes {path} of the entry '{name}'. {_ASK}")
    return name


def _changes(folder: Path, fork: str) -> Iterator[tuple[str, str]]:
    """(status, path) of every file of the leaderboard that differs; a rename is two of them."""
    options = ("--name-status", "-z", "--no-renames", "--relative", "--no-ext-diff")
    out = _git(folder, "diff", *options, fork, "HEAD", "--", BOARD)
    fields = iter(os.fsdecode(out).split("\0")[:-1])
    return zip(fields, fields, strict=True)


def _verified_anew(folder: Path, fork: str) -> set[str]:
    """The entries of which the branch says something else in ``verification.json``."""

    def at(revision: str) -> set[str]:
        if not _git(folder, "ls-tree", "--name-only", revision, "--", _VERIFICATIONS):
            return set()
        data = _git(folder, "show", f"{revision}:./{_VERIFICATIONS}")
        return {v.model_dump_json() for v in verifications_from(data, _VERIFICATIONS)}

    differ = at(fork) ^ at("HEAD")
    return {v.entry for v in verifications_from(f"[{','.join(differ)}]".encode(), _VERIFICATIONS)}


def _git(folder: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    except OSError as error:
        raise InputError(f"git cannot be run: {error}. It says what a branch changes.") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise InputError(f"git {arguments[0]} failed in {folder.resolve()}: {said}")
    return done.stdout
