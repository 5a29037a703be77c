"""What others found out about entries: how far one was verified, and which samples fell since.

Both lie outside of the entries, and the check of a pull request leaves them to the maintainers
(``changed.py``). A verification names the very file of records by its hash, and lapses with it; a
break is of weights, and holds for whatever records say of them.
"""

import json
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, TypeAdapter, ValidationError

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import read_plain
from mmtard_bench.leaderboard.entries.text import EntryName, Plain, SuiteName
from mmtard_bench.records.schema import Digest
from mmtard_bench.schema import Strict, explain

Level = Literal["well-formed", "replayed", "re-attacked", "reproduced"]
LEVELS: tuple[Level, ...] = ("well-formed", "replayed", "re-attacked", "reproduced")
"""From the weakest to the strongest; each includes those before it."""


def _day(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("expected a date such as 2026-11-25")
    return text


Day = Annotated[str, AfterValidator(_day)]


class Verification(Strict):
    """A level that somebody verified. ``detail`` says with which figures."""

    entry: EntryName
    suite: SuiteName
    records: Digest
    level: Level
    date: Day
    version: Plain
    by: Plain
    detail: Plain


_VERIFICATIONS = TypeAdapter(list[Verification])


def read_verifications(path: Path) -> list[Verification]:
    """Read ``verification.json``; nothing if there is none. Raises InputError."""
    if not path.exists():
        return []
    try:
        return _VERIFICATIONS.validate_json(read_plain(path))
    except ValidationError as error:
        raise InputError(f"The verifications in {path} are not valid: {explain(error)}") from error


def verifications_to_text(found: list[Verification]) -> str:
    """Verifications as they are kept, one a line."""
    lines = ",\n".join(f" {json.dumps(v.model_dump(), ensure_ascii=False)}" for v in found)
    return f"[\n{lines}\n]\n"
