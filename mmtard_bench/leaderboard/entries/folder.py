"""An entry is a directory: ``card.json``, and a file of records a suite."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.card import Card, card_from_text
from mmtard_bench.leaderboard.entries.pack import unpack
from mmtard_bench.leaderboard.entries.text import EntryName, SuiteName, skeleton
from mmtard_bench.records.files import load_records, read_record
from mmtard_bench.records.schema import Record

LARGEST = 16 * 2**20
"""Bytes of a file of an entry: the largest suite that ships needs two million."""
MOST_FILES = 64

_NAME = TypeAdapter(EntryName)
_SUITE = TypeAdapter(SuiteName)


@dataclass(frozen=True)
class Run:
    """The records of an entry on one suite; ``digest`` is the SHA-256 of their file."""

    suite: str
    digest: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Entry:
    """A model's card with its runs. ``place`` is its directory."""

    card: Card
    runs: tuple[Run, ...]
    place: Path

    @property
    def records(self) -> list[Record]:
        """All records, suite after suite."""
        return [record for run in self.runs for record in run.records]

    def only(self, suite: str) -> "Entry":
        """The entry with its records of one suite. Raises InputError if it has none."""
        runs = tuple(run for run in self.runs if run.suite == suite)
        if not runs:
            known = ", ".join(run.suite for run in self.runs)
            raise InputError(
                f"The entry '{self.card.name}' has no records of '{suite}'; it has {known}."
            )
        return replace(self, runs=runs)


def read_entry(folder: Path) -> Entry:
    """Read an entry. Raises InputError if anything in it is not as it must be.

    Names and sizes are looked at before contents.
    """
    name = require_name(folder.resolve().name)
    files = _files(folder)
    card = card_from_text(_text(folder / "card.json"), str(folder / "card.json"))
    if card.name != name:
        raise InputError(f"The card in {folder} is of '{card.name}'; expected '{name}'.")
    runs = [_read_run(path, card) for path in files if path.name != "card.json"]
    if not runs:
        raise InputError(f"The entry {folder} has no records; expected SUITE.json beside its card.")
    return Entry(card, tuple(runs), folder)


def read_entries(root: Path) -> list[Entry]:
    """Every entry below a directory, by name. Raises InputError, also for names that look alike."""
    if not root.is_dir():
        raise InputError(f"There is no directory {root}; expected a directory of entries.")
    names = names_of(root)
    require_distinct(names)
    return [read_entry(root / name) for name in names]


def is_entry(folder: Path) -> bool:
    """Whether a folder has the card of an entry, whole or damaged; a training's card is another."""
    path = folder / "card.json"
    if not path.is_file():  # a pipe would never end
        return False
    try:
        card = json.loads(path.read_bytes())
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True
    return isinstance(card, dict) and "weights" in card


def holds_entries(root: Path) -> bool:
    """Whether a directory is one of entries, and not of a run's records."""
    return any(is_entry(path.parent) for path in root.glob("*/card.json"))


def require_outside(path: Path) -> Path:
    """The path, if what is written there harms no entry.

    An entry holds nothing but its card and records, and a directory of entries nothing but entries:
    any other file makes ``verify`` and ``leaderboard`` refuse them. Raises InputError. Whoever
    works in a directory with an entry in it may write there, unless its name is "entries".
    """
    folders = [path.resolve(), *path.resolve().parents]
    inside = next(filter(is_entry, folders), None)
    existing = next(filter(os.path.isdir, folders))
    among = _is_board(existing) and (existing != Path.cwd() or existing.name == "entries")
    if inside is None and not among:
        return path
    raise InputError(
        f"{path} is in the leaderboard's {'entry' if inside else 'entries'} {inside or existing}, "
        "which would be refused with another file in it; choose a place outside."
    )


def _is_board(folder: Path) -> bool:
    """Whether a directory holds entries and nothing else."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return False
    return bool(found) and all(map(is_entry, found))


def names_of(root: Path) -> list[str]:
    """The names of the entries below a directory. Raises InputError for anything else in it."""
    folders = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    for folder in folders:
        if folder.is_symlink() or not folder.is_dir():
            raise InputError(f"{folder} is not an entry's directory; remove it.")
    return [folder.name for folder in folders]


def require_distinct(names: Iterable[str]) -> None:
    """Raise InputError if two names of entries look alike, or if one cannot be such a name."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(skeleton(require_name(name)), name)
        if other != name:
            raise InputError(f"The entries '{other}' and '{name}' look alike; choose another name.")


def require_name(name: str) -> str:
    """The name of an entry. Raises InputError for one that is a path, or not plain ASCII."""
    try:
        return _NAME.validate_python(name)
    except ValidationError as error:
        raise InputError(
            f"{name[:100]!r} cannot be the name of an entry; expected at most 64 lower-case ASCII "
            "letters and digits, with single '.', '_' or '-' between them."
        ) from error


def file_digest(data: bytes) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def require_plain_file(path: Path) -> None:
    """Raise InputError for a link, for what is no file, and for a file that is too large."""
    if not os.path.lexists(path):
        raise InputError(f"There is no file {path}; expected one.")
    if path.is_symlink() or not path.is_file():
        raise InputError(
            f"{path} is not a plain file; the leaderboard has nothing else. Remove it."
        )
    if path.stat().st_size > LARGEST:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes; files of the leaderboard have at most "
            f"{LARGEST:,}. Adversarial images stay elsewhere."
        )


def read_plain(path: Path) -> bytes:
    """The bytes of a file of strangers. Raises InputError as ``require_plain_file`` does."""
    require_plain_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


def _files(folder: Path) -> Sequence[Path]:
    """The files of an entry, once their names and sizes are in order."""
    if not folder.is_dir():
        raise InputError(f"There is no directory {folder}; expected an entry's.")
    files = sorted(folder.iterdir())
    if len(files) > MOST_FILES:
        raise InputError(f"The entry {folder} has {len(files)} files; at most {MOST_FILES} are.")
    for path in files:
        require_plain_file(path)
        if path.name != "card.json":
            try:
                _SUITE.validate_python(path.name.removesuffix(".json"))
            except ValidationError:
                raise InputError(
                    f"{path} does not belong into an entry; expected card.json and SUITE.json. "
                    "Remove it."
                ) from None
    return files


def _text(path: Path) -> str:
    try:
        return read_plain(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


def _read_run(path: Path, card: Card) -> Run:
    text = _text(path)
    suite = path.stem
    records = unpack(text, str(path))
    places = {(record.task.name, record.threat.name) for record in records}
    if len(places) < len(records):
        raise InputError(f"{path} has two records for one task and threat model.")
    for record in records:
        if record.suite is None or record.suite.name != suite:
            raise InputError(f"{path} has a record of another suite than {suite}.")
        model = record.model
        facts = (model.name, model.source, model.digest, model.parameters)
        if facts != (card.name, card.weights, card.digest, card.parameters):
            raise InputError(
                f"{path} has a record of another model than its card: {', '.join(map(str, facts))}."
            )
    return Run(suite, file_digest(text.encode()), tuple(records))


def records(path: str | Path) -> list[Record]:
    """Read records.

    Args:
        path: A record's file, a directory of records, an entry, or a directory of entries.

    Returns:
        The records, in the order of their files.

    Raises:
        InputError: If there are none, or if one was edited or cut short.
    """
    path = Path(path)
    if is_entry(path):
        return read_entry(path).records
    if holds_entries(path):
        return [record for entry in read_entries(path) for record in entry.records]
    found = [read_record(path)] if path.is_file() else load_records(path)
    if not found:
        raise InputError(f"There are no records below {path}.")
    return found
