"""Verifications: which level somebody verified for an entry.

They lie outside the entries, and only maintainers may change them (``verify/branch.py``). A
verification holds for one exact records file, which it names by its hash; if the file changes, the
verification is void. A break (``breaks.py``) holds for weights, whatever the records say.
"""

import json
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, TypeAdapter

from mmtard_bench.leaderboard.entries.folder import read_plain
from mmtard_bench.leaderboard.entries.text import EntryName, Plain, SuiteName
from mmtard_bench.records.schema import Digest
from mmtard_bench.schema import Strict, explained

Level = Literal["well-formed", "replayed", "re-attacked", "reproduced"]
LEVELS: tuple[Level, ...] = ("well-formed", "replayed", "re-attacked", "reproduced")
"""From the weakest to the strongest; each level includes the levels before it."""


def _day(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("expected a date such as 2026-11-25")
    return text


Day = Annotated[str, AfterValidator(_day)]


class Verification(Strict):
    """A level that somebody verified; ``detail`` has the figures."""

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
    """Read ``verification.json``; [] if there is none. Raises InputError."""
    if not path.exists():
        return []
    with explained(f"The verifications in {path} are not valid"):
        return _VERIFICATIONS.validate_json(read_plain(path))


def verifications_to_text(found: list[Verification]) -> str:
    """The text of ``verification.json``: JSON with a verification per line."""
    lines = ",\n".join(f" {json.dumps(v.model_dump(), ensure_ascii=False)}" for v in found)
    return f"[\n{lines}\n]\n"
