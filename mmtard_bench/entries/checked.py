"""What others found out about entries: how far one was verified, and which samples fell since.

Both lie outside of the entries, so that a submitter cannot write them, and both name the file of
records that they are about by its hash: they lapse with it.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mmtard_bench.entries.text import EntryName, Plain, SuiteName, Url
from mmtard_bench.errors import InputError, explain
from mmtard_bench.records import Digest
from mmtard_bench.strict import Strict

Level = Literal["well-formed", "replayed", "re-attacked", "reproduced"]
LEVELS: tuple[Level, ...] = ("well-formed", "replayed", "re-attacked", "reproduced")
"""From the weakest to the strongest; each includes those before it."""

Day = Annotated[str, Field(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$")]


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


class Fallen(PixelBall):
    """Samples of a task that an adversarial image in a ball breaks."""

    ids: list[Annotated[str, Field(max_length=300)]] = Field(min_length=1)


class Break(Strict):
    """A stronger attack on an entry: its samples count as broken, with credit.

    ``adversarials`` is the SHA-256 of the file whose images were replayed.
    """

    entry: EntryName
    suite: SuiteName
    records: Digest
    by: Plain
    paper: Url | None
    date: Day
    adversarials: Digest
    fallen: list[Fallen] = Field(min_length=1)


_VERIFICATIONS = TypeAdapter(list[Verification])


def read_verifications(path: Path) -> list[Verification]:
    """Read ``verification.json``; nothing if there is none. Raises InputError."""
    if not path.is_file():
        return []
    try:
        return verifications_from(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"The verifications in {path} cannot be read: {error}.") from error


def verifications_from(data: bytes, where: str) -> list[Verification]:
    """Verifications from a file's content. Raises InputError."""
    try:
        return _VERIFICATIONS.validate_json(data)
    except ValidationError as error:
        raise InputError(f"The verifications in {where} are not valid: {explain(error)}") from error


def verifications_to_text(found: list[Verification]) -> str:
    """Verifications as they are kept, one a line."""
    lines = ",\n".join(f" {json.dumps(v.model_dump(), ensure_ascii=False)}" for v in found)
    return f"[\n{lines}\n]\n"


def read_breaks(folder: Path) -> list[Break]:
    """Read every ENTRY--WHO.json of a directory; nothing if there is none. Raises InputError."""
    breaks: list[Break] = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = Break.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            why = explain(error) if isinstance(error, ValidationError) else str(error)
            raise InputError(f"The break {path} cannot be read: {why}") from error
        if path.name.partition("--")[0] != found.entry:
            raise InputError(f"The break {path} is of '{found.entry}'; expected that in its name.")
        breaks.append(found)
    return breaks
