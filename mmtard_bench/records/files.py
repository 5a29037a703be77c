"""Read and write records as files."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import (
    ValidationError,
)

from mmtard_bench.errors import InputError
from mmtard_bench.records.schema import Record, unseal
from mmtard_bench.schema import explain

_MARKS = {"identity", "samples", "sample_ids_digest"}
"""Keys that only records have."""


def from_text(text: str, where: str) -> Record:
    """Read a record's canonical text. Raises InputError if a byte of it is not as written."""
    try:
        record = Record.model_validate_json(unseal(text))
        why = "" if record.to_text() == text else "it is not the text that this program wrote."
    except ValidationError as error:
        why = explain(error)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"it is no whole JSON record ({type(error).__name__})."
    if why:
        raise InputError(
            f"The record {where} was edited or cut short, or is no record at all: {why} "
            "Restore it, or delete it and run again."
        )
    return record


def read_record(path: str | Path) -> Record:
    """Read one record file. Raises InputError if it is unreadable, edited or cut short."""
    return from_text(_read(path), str(path))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(f"The record {path} cannot be read: {error}.") from error


def made_at(record: Record) -> datetime:
    """When a record was made; a time without a zone is taken as UTC. Raises InputError."""
    try:
        made = datetime.fromisoformat(record.created)
    except ValueError as error:
        raise InputError(
            f"A record of {record.model.name} on {record.task.name} was created at "
            f"{record.created[:40]!r}; expected a time such as 2026-11-24T09:30:00+00:00."
        ) from error
    return made if made.tzinfo else made.replace(tzinfo=UTC)


def oldest_first(records: Iterable[Record]) -> list[Record]:
    """Records in an order in which, of two for one place, the one that counts comes last."""
    return sorted(records, key=lambda record: (made_at(record), record.identity))


def load_records(root: Path) -> list[Record]:
    """Every record below a directory, by path. Files of JSON that are no records are passed over.

    Raises InputError for one that was edited or cut short.
    """
    if not root.is_dir():
        raise InputError(f"There is no directory {root}; expected a directory of records.")
    paths = sorted(path for path in root.rglob("*.json") if not path.name.startswith("."))
    found = (_record_at(path) for path in paths if path.is_file())
    return [record for record in found if record is not None]


def _record_at(path: Path) -> Record | None:
    """The record in a file; None for whole JSON that has nothing of a record."""
    text = _read(path)
    try:
        return from_text(text, str(path))
    except InputError:
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = dict.fromkeys(_MARKS)
        if isinstance(body, dict) and body.keys() & _MARKS:
            raise
        return None
