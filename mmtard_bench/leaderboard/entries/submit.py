"""From the records of a run to an entry."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.files import write_atomically
from mmtard_bench.leaderboard.entries.card import Card, card_from_text, card_to_text
from mmtard_bench.leaderboard.entries.folder import (
    Entry,
    is_entry,
    names_of,
    read_entry,
    require_distinct,
)
from mmtard_bench.leaderboard.entries.pack import pack
from mmtard_bench.records.schema import Record
from mmtard_bench.records.worst import counted, is_complete
from mmtard_bench.schema import validate

LISTS = ("authors",)
"""Fields of a card that are lists; their values are separated by semicolons."""


def submit(
    records: Sequence[Record], *, name: str, facts: Mapping[str, str], root: Path
) -> tuple[Entry, list[Path]]:
    """Write the records of a model as the entry ``name`` below ``root``.

    ``facts`` are fields of its card; those of an entry that is there already stay, unless the
    weights are others. In the records the model takes the entry's name, and where its weights are.
    Returns the entry and the files that were written. Raises InputError, and then leaves everything
    as it was: the whole entry is written and read beside its place before it goes there.
    """
    there = names_of(root) if root.is_dir() else []
    require_distinct([*there, name])
    for other in there:
        if not is_entry(root / other):
            raise InputError(
                f"{root} holds '{other}', which is no entry, and would be refused with it; choose "
                "other --entries, a directory of entries alone."
            )
    runs = newest(records)
    folder = root / name
    card = _card(next(iter(runs.values()))[0], name, facts, folder / "card.json")
    files = {"card.json": card_to_text(card)}
    for suite, found in runs.items():
        files[f"{suite}.json"] = pack([_named(record, card) for record in found])
    with _beside(root) as elsewhere:
        place = elsewhere / name
        try:
            _build(place, files, earlier=folder)
        except InputError as error:
            # With the paths that the entry will have.
            raise type(error)(str(error).replace(str(place), str(folder))) from error
        _swap(place, folder)
    return read_entry(folder), [folder / file for file in files]


@contextmanager
def _beside(root: Path) -> Iterator[Path]:
    """A directory on the disk of the entries, whose name is none of an entry, for a while."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    elsewhere = None
    try:
        with _storage(root):
            root.mkdir(parents=True, exist_ok=True)
            elsewhere = Path(tempfile.mkdtemp(dir=root, prefix=".submit-"))
        yield elsewhere
    finally:
        if elsewhere is not None:
            shutil.rmtree(elsewhere, ignore_errors=True)
        with suppress(OSError):  # not empty: the entry is there
            for folder in made:
                folder.rmdir()


def _build(place: Path, files: Mapping[str, str], *, earlier: Path) -> None:
    """Write an entry with what is in the earlier one, and see that it is in order."""
    with _storage(place):
        if earlier.is_dir():
            shutil.copytree(earlier, place, symlinks=True)
    for file, text in files.items():
        write_atomically(place / file, text)
    read_entry(place)


def _swap(place: Path, folder: Path) -> None:
    """Put a directory in the place of another one, or of none."""
    old = place.with_name("earlier")
    with _storage(folder):
        if folder.is_dir():
            folder.rename(old)
        try:
            place.rename(folder)
        except OSError:
            if old.is_dir():
                old.rename(folder)
            raise


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # shutil's errors are of this kind, too
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}. Nothing was changed; free "
            "space or choose other --entries, and run the same command again."
        ) from error


def newest(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each suite that count (``summary.counted``), in order.

    Raises InputError for records of several models, and for a run that is not whole.
    """
    models = {record.model.digest for record in records}
    if len(models) != 1:
        raise InputError(
            f"The records are of {len(models)} models; an entry has one. Name its directory, "
            "such as runs/digits-v1/my-clip-1a2b3c4d."
        )
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        suite = record.suite.name if record.suite else ""
        if not suite or "+" in suite:
            raise InputError(
                f"A record is of {suite or 'no suite'}; an entry has whole suites, without --n "
                "and --seed."
            )
        runs[suite].append(record)
    whole = {}
    for suite, found in sorted(runs.items()):
        places = {(r.task.name, r.threat.name): r for r in counted(found)[0]}
        whole[suite] = [places[place] for place in sorted(places)]
        if not is_complete(whole[suite]):
            raise InputError(
                f"The run of {suite} lacks records, or has records that failed or are of older "
                "data; run the suite again with the same command, which resumes."
            )
    return whole


def _card(record: Record, name: str, facts: Mapping[str, str], path: Path) -> Card:
    model = record.model
    body: dict[str, object] = {"weights": model.source}
    if path.is_file():
        before = card_from_text(path.read_text("utf-8"), str(path))
        if before.digest == model.digest:
            body = before.model_dump()
    for key, value in facts.items():
        body[key] = [v.strip() for v in value.split(";")] if key in LISTS else value
    body.update(name=name, digest=model.digest, parameters=model.parameters)
    return validate(Card, body, f"model card of '{name}'")


def _named(record: Record, card: Card) -> Record:
    facts = record.model.model_copy(update={"name": card.name, "source": card.weights})
    return record.model_copy(update={"model": facts})
