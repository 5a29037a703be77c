"""The contents of a leaderboard, read from its directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.breaks import Break, read_breaks
from mmtard_bench.leaderboard.entries.folder import Entry, Run, holds_entries, read_entries
from mmtard_bench.leaderboard.entries.verifications import (
    LEVELS,
    Verification,
    read_verifications,
)
from mmtard_bench.leaderboard.reported import Reported, read_reported
from mmtard_bench.records.files import load_records
from mmtard_bench.records.schema import Record


@dataclass(frozen=True)
class Board:
    """Entries with their verifications and breaks, records of runs, figures of others.

    ``loose`` are records that belong to no entry; a leaderboard of one's own runs has only those.
    """

    entries: Sequence[Entry] = ()
    loose: Sequence[Record] = ()
    verifications: Sequence[Verification] = ()
    breaks: Sequence[Break] = ()
    reported: Sequence[Reported] = ()

    @property
    def records(self) -> list[Record]:
        """Every record, of entries and others."""
        return [*(record for entry in self.entries for record in entry.records), *self.loose]

    def verified(self, entry: Entry, run: Run) -> Verification | None:
        """The highest verified level of a run's records file, the newest if there are several."""
        found = [
            v for v in self.verifications if v.entry == entry.card.name and v.records == run.digest
        ]
        return max(found, key=lambda v: (LEVELS.index(v.level), v.date), default=None)

    def breaks_of(self, entry: Entry, run: Run) -> list[Break]:
        """The stronger attacks on an entry's weights in the suite of a run."""
        model = entry.card.digest
        return [b for b in self.breaks if b.model == model and b.suite == run.suite]


def read_board(root: Path, reported: Path | None = None) -> Board:
    """Read the entries in ``root``, or the records of runs below it.

    The parent of ``root`` holds ``verification.json`` and ``breaks/``. ``reported`` is the CSV file
    of published figures; default: ``reported.csv`` in the same parent, if it exists. Raises
    InputError if a file is missing or invalid.
    """
    if not root.is_dir():
        raise InputError(f"There is no directory {root}; expected entries, or records of runs.")
    beside = reported or root.parent / "reported.csv"
    figures = read_reported(beside) if reported or beside.is_file() else []
    if not holds_entries(root):
        loose = load_records(root)
        if not loose and not figures:
            raise InputError(f"There are no records below {root}; expected entries, or runs.")
        return Board(loose=loose, reported=figures)
    return Board(
        entries=read_entries(root),
        verifications=read_verifications(root.parent / "verification.json"),
        breaks=read_breaks(root.parent / "breaks"),
        reported=figures,
    )
