"""What stronger attacks took from an entry's worst cases. Imports without torch.

A sample that an image broke counts as broken in every ball of its task that holds the image: the
same norm and surface, and a radius at least as large, with or without edits of the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmtard_bench.entries.checked import Break
from mmtard_bench.records.worst import WorstCase


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
