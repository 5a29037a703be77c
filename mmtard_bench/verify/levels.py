"""The levels of verification, each of which includes those before it.

- *well-formed*: the entry says of itself what this version would say; no model is needed.
- *replayed*: its weights give its clean predictions, and its stored images break what they should.
- *re-attacked*: of the samples that it calls robust, some drawn at random stand again.
- *reproduced*: the whole suite, run again, says the same.

Nothing of an entry is executed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mmtard_bench import __version__
from mmtard_bench.adversarials import Adversarials
from mmtard_bench.entries.checked import (
    LEVELS,
    Level,
    Verification,
    read_verifications,
    verifications_to_text,
)
from mmtard_bench.entries.folder import Entry, Run
from mmtard_bench.errors import InputError, reason
from mmtard_bench.models.clip import Clip
from mmtard_bench.records import write_atomically
from mmtard_bench.resources import Resources
from mmtard_bench.verify.again import Draw, attack_draws, places_of, require_few
from mmtard_bench.verify.formed import Formed, require_formed
from mmtard_bench.verify.replayed import replay, replay_images
from mmtard_bench.verify.reproduced import reproduce
from mmtard_bench.verify.weights import load_weights, require_data


@dataclass(frozen=True)
class Options:
    """How far to verify, and with what.

    ``draws`` of the samples called robust in each ball are attacked again, chosen by ``seed``.
    """

    level: Level
    draws: int
    seed: int
    adversarials: Adversarials | None = None
    weights: str | None = None

    def reaches(self, level: Level) -> bool:
        """Whether a level is asked for."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


def verify(
    entry: Entry, options: Options, resources: Callable[[], Resources], tell: Callable[[str], None]
) -> list[tuple[Run, str]]:
    """Verify every run of an entry; returns each with the figures of the highest level.

    Raises InputError at the first thing that is not as it must be.
    """
    require_data(entry.card.weights)
    formed = [require_formed(run) for run in entry.runs]
    details = [f"{len(run.places)} records of {run.suite.name}" for run in formed]
    for detail in details:
        tell(f"well-formed: {detail}")
    if options.reaches("replayed"):
        with failures_of(entry):
            clip = load_weights(entry.card, options.weights)
            details = [_with_model(entry, run, clip, options, resources(), tell) for run in formed]
    return list(zip(entry.runs, details, strict=True))


def _with_model(
    entry: Entry,
    formed: Formed,
    clip: Clip,
    options: Options,
    resources: Resources,
    tell: Callable[[str], None],
) -> str:
    name = formed.suite.name
    detail = replay(formed, clip, resources)
    tell(f"replayed: {name}: {detail}")
    if options.adversarials is not None:
        images = replay_images(formed, entry.card, options.adversarials, clip, resources)
        tell(f"replayed: {name}: {images}")
        detail = f"{detail}; {images}"
    elif entry.card.adversarials:
        tell(f"replayed: {name}: the stored images were not; give --adversarials FILE")
    if options.reaches("re-attacked"):
        detail = _attack_all(formed, clip, options, resources, tell)
    if options.reaches("reproduced"):
        found = reproduce(formed, clip, resources, tell=lambda line: tell(f"reproduced: {line}"))
        theirs = sum(comparison.entry_only for comparison in found)
        ours = sum(comparison.ours_only for comparison in found)
        detail = f"{len(found)} records; samples robust for the entry only {theirs}, here {ours}"
        tell(f"reproduced: {name}: {detail}")
    return detail


def _attack_all(
    formed: Formed,
    clip: Clip,
    options: Options,
    resources: Resources,
    tell: Callable[[str], None],
) -> str:
    draws: list[Draw] = []
    balls = places_of(formed)
    spent = left = 0.0
    for place, (ball, attacked) in enumerate(balls):
        started = time.monotonic()
        draw = attack_draws(ball, attacked, clip, resources, count=options.draws, seed=options.seed)
        draws.append(draw)
        spent += time.monotonic() - started
        left = spent / (place + 1) * (len(balls) - place - 1)
        tell(f"re-attacked: {draw.line}" + (f" (about {left:.0f} s left)" if left > 20 else ""))
    for draw in draws:
        require_few(draw)
    worst = max(draws, key=lambda draw: draw.overstated)
    fell, drawn = sum(len(draw.fell) for draw in draws), sum(draw.drawn for draw in draws)
    detail = (
        f"seed {options.seed}: {fell} of {drawn} samples fell; overstated by at most "
        f"{100 * worst.overstated:.1f} points in a task and ball (95%)"
    )
    tell(f"re-attacked: {formed.suite.name}: {detail}")
    return detail


@contextmanager
def failures_of(entry: Entry) -> Iterator[None]:
    """Whatever a stranger's model raises is an InputError that names its entry."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # models and their kernels raise anything
        raise InputError(f"The model of '{entry.card.name}' fails: {reason(error)}") from error


def record(entry: Entry, found: list[tuple[Run, str]], level: Level, by: str) -> Path:
    """Write down in ``verification.json``, beside the entries, that a level was verified.

    Raises InputError if ``by`` is no plain text.
    """
    path = entry.place.resolve().parent.parent / "verification.json"
    new = [
        Verification(
            entry=entry.card.name,
            suite=run.suite,
            records=run.digest,
            level=level,
            date=today(),
            version=__version__,
            by=by,
            detail=detail,
        )
        for run, detail in found
    ]
    known = {_key(each): each for each in [*read_verifications(path), *new]}
    write_atomically(path, verifications_to_text([known[key] for key in sorted(known)]))
    return path


def _key(each: Verification) -> tuple[str, str, int, str, str]:
    """Of the same level, verified again by the same person, the last counts."""
    return each.entry, each.suite, LEVELS.index(each.level), each.records, each.by


def today() -> str:
    """The date, as it is written down."""
    return datetime.now(UTC).date().isoformat()
