"""What others found out about entries: how far one was verified, and which samples fell since.

Both lie outside of the entries, and the check of a pull request leaves them to the maintainers
(``changed.py``). A verification names the very file of records by its hash, and lapses with it; a
break is of weights, and holds for whatever records say of them.
"""

import json
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from mmtard_bench.entries.folder import read_plain
from mmtard_bench.entries.text import EntryName, Plain, SuiteName, Url
from mmtard_bench.errors import InputError
from mmtard_bench.records.schema import Digest, Name, ThreatFacts
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


class PixelBall(Strict):
    """A task, and a ball of pixels."""

    task: Plain
    norm: Literal["linf", "l2"]
    eps: str = Field(pattern=r"^[1-9][0-9]{0,5}/[1-9][0-9]{0,5}$")
    surface: Literal["native", "model"]

    def is_in(self, task: str, threat: ThreatFacts) -> bool:
        """Whether it lies in the ball of a threat model on a task; edits of text are not asked."""
        same = (self.task, self.norm, self.surface) == (task, threat.norm, threat.surface)
        return same and Fraction(self.eps) <= Fraction(threat.eps)


class Fallen(PixelBall):
    """Samples of a task that an adversarial image in a ball breaks."""

    ids: list[Annotated[str, Field(max_length=300)]] = Field(min_length=1)


class Break(Strict):
    """A stronger attack on the weights of an entry: its samples count as broken, with credit.

    ``model`` is the digest of the weights, ``adversarials`` the SHA-256 of the file whose images
    were replayed, ``images`` where it is.
    """

    entry: EntryName
    suite: SuiteName
    model: Name
    by: Plain
    paper: Url | None
    date: Day
    adversarials: Digest
    images: Url | None
    fallen: list[Fallen] = Field(min_length=1)


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


def read_breaks(folder: Path) -> list[Break]:
    """Read every ENTRY--WHO.json of a directory; nothing if there is none. Raises InputError."""
    breaks: list[Break] = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = Break.model_validate_json(read_plain(path))
        except ValidationError as error:
            raise InputError(f"The break {path} is not valid: {explain(error)}") from error
        if path.name.partition("--")[0] != found.entry:
            raise InputError(f"The break {path} is of '{found.entry}'; expected that in its name.")
        breaks.append(found)
    return breaks
