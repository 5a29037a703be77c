"""Images by which somebody broke an entry, and how far they lower its robust accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import read_plain
from mmtard_bench.leaderboard.entries.text import EntryName, Plain, SuiteName, Url
from mmtard_bench.leaderboard.entries.verifications import Day
from mmtard_bench.records.schema import Digest, Name, ThreatFacts
from mmtard_bench.records.worst import WorstCase
from mmtard_bench.schema import Strict, explain


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


@dataclass(frozen=True)
class Credit:
    """A stronger attack, and how many samples of a row's worst cases it was the first to break."""

    by: str
    paper: str | None
    date: str
    samples: int


def lowered(
    worst: Sequence[WorstCase], breaks: Sequence[Break]
) -> tuple[list[WorstCase], list[Credit]]:
    """The worst cases after some breaks of their run, oldest first, with credits for what fell."""
    cases, credits = list(worst), []
    for found in sorted(breaks, key=lambda found: (found.date, found.by)):
        fell: set[tuple[str, str]] = set()
        for fallen in found.fallen:
            for i, case in enumerate(cases):
                if not fallen.is_in(case.task, case.threat):
                    continue
                ids = {x for x in fallen.ids if case.stands.get(x)}
                stands = {**case.stands, **dict.fromkeys(ids, False)}
                cases[i] = replace(case, stands=stands, fell=case.fell + len(ids))
                fell |= {(case.task, x) for x in ids}
        if fell:
            credits.append(Credit(found.by, found.paper, found.date, len(fell)))
    return cases, credits
