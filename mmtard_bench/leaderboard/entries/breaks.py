"""Breaks: samples of an entry that a stronger attack breaks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import read_plain
from mmtard_bench.leaderboard.entries.text import EntryName, Plain, SuiteName, Url
from mmtard_bench.leaderboard.entries.verifications import Day
from mmtard_bench.records.schema import Digest, Name, ThreatFacts
from mmtard_bench.records.worst import WorstCase
from mmtard_bench.schema import Strict, explained


class PixelBall(Strict):
    """A task, and a ball around its images."""

    task: Plain
    norm: Literal["linf", "l2"]
    eps: str = Field(pattern=r"^[1-9][0-9]{0,5}/[1-9][0-9]{0,5}$")
    surface: Literal["native", "model"]

    def is_in(self, task: str, threat: ThreatFacts) -> bool:
        """Whether it lies in the pixel ball of a threat model on a task; text edits are ignored."""
        same = (self.task, self.norm, self.surface) == (task, threat.norm, threat.surface)
        return same and Fraction(self.eps) <= Fraction(threat.eps)


class Fallen(PixelBall):
    """Samples of a task that an adversarial image in a ball breaks."""

    ids: list[Annotated[str, Field(max_length=300)]] = Field(min_length=1)


class Break(Strict):
    """A stronger attack on the weights of an entry. Its samples count as broken, with credit.

    ``model`` is the digest of the weights, ``adversarials`` the SHA-256 of the file of images that
    was replayed, ``images`` the address of that file.
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
    """Read every ENTRY--WHO.json of a directory; [] if there is none. Raises InputError."""
    breaks: list[Break] = []
    for path in sorted(folder.glob("*.json")):
        with explained(f"The break {path} is not valid"):
            found = Break.model_validate_json(read_plain(path))
        if path.name.partition("--")[0] != found.entry:
            raise InputError(f"The break {path} is of '{found.entry}'; expected that in its name.")
        breaks.append(found)
    return breaks


@dataclass(frozen=True)
class Credit:
    """A stronger attack, and the number of a row's samples that it was the first to break."""

    by: str
    paper: str | None
    date: str
    samples: int


def after_breaks(
    worst: Sequence[WorstCase], breaks: Sequence[Break]
) -> tuple[list[WorstCase], list[Credit]]:
    """Count the samples of breaks as broken. Returns the worst cases and the credits of each break.

    ``breaks`` belong to the run of the worst cases. The oldest break of a sample gets its credit.
    """
    cases, credits = list(worst), []
    for found in sorted(breaks, key=lambda found: (found.date, found.by)):
        broken: set[tuple[str, str]] = set()
        for fallen in found.fallen:
            for i, case in enumerate(cases):
                if not fallen.is_in(case.task, case.threat):
                    continue
                ids = {x for x in fallen.ids if case.robust.get(x)}
                robust = {**case.robust, **dict.fromkeys(ids, False)}
                cases[i] = replace(case, robust=robust, broken_since=case.broken_since + len(ids))
                broken |= {(case.task, x) for x in ids}
        if broken:
            credits.append(Credit(found.by, found.paper, found.date, len(broken)))
    return cases, credits
