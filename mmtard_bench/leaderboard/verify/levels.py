"""The levels of verification. Each level includes the levels before it.

- *well-formed*: the records are complete and consistent with this version. No model is needed.
- *replayed*: the weights give the clean predictions of the records, and stored adversarial images
  break the samples that they are stored for.
- *re-attacked*: a random draw of the robust samples is attacked with another seed, by Square and by
  other gradients, and stays robust; published samples are compared with fresh ones.
- *reproduced*: a second run of the whole suite gives the same verdicts.

No code of an entry is executed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mmtard_bench import __version__
from mmtard_bench.errors import InputError, reason
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.files import write_atomically
from mmtard_bench.leaderboard.entries.folder import Entry, Run
from mmtard_bench.leaderboard.entries.verifications import (
    LEVELS,
    Level,
    Verification,
    read_verifications,
    verifications_to_text,
)
from mmtard_bench.leaderboard.verify.fresh import require_alike
from mmtard_bench.leaderboard.verify.images import Adversarials
from mmtard_bench.leaderboard.verify.reattacked import reattack
from mmtard_bench.leaderboard.verify.recalls import require_recalls
from mmtard_bench.leaderboard.verify.replayed import replay, replay_images
from mmtard_bench.leaderboard.verify.reproduced import reproduce
from mmtard_bench.leaderboard.verify.weights import load_weights, require_data
from mmtard_bench.leaderboard.verify.well_formed import Formed, require_formed
from mmtard_bench.models.clip import Clip


@dataclass(frozen=True)
class Options:
    """The level to verify, and what verification needs.

    Attributes:
        level: The highest level to verify.
        draws: The number of robust samples per task and ball that are re-attacked.
        seed: The seed that draws these samples.
        adversarials: The entry's file of adversarial images; None if they are not replayed.
        weights: A model spec to load instead of the card's weights; None for the card's.
        surrogate: The spec of another model, whose adversarial images the re-attack tries; None
            for the one that ships for the data, if there is one.
    """

    level: Level
    draws: int
    seed: int
    adversarials: Adversarials | None = None
    weights: str | None = None
    surrogate: str | None = None

    def reaches(self, level: Level) -> bool:
        """Whether verification includes ``level``."""
        return LEVELS.index(self.level) >= LEVELS.index(level)


def verify(
    entry: Entry, options: Options, resources: Callable[[], Resources], tell: Callable[[str], None]
) -> list[tuple[Run, str]]:
    """Verify every run of an entry.

    Args:
        entry: The entry to verify.
        options: The level and what it needs.
        resources: Makes the device and batch size; called only if a level needs the model.
        tell: Receives a progress message per step.

    Returns:
        Each run with a summary of the highest level.

    Raises:
        InputError: At the first check that fails.
    """
    require_data(entry.card.weights)
    formed = [require_formed(run) for run in entry.runs]
    details = [f"{len(run.places)} records of {run.suite.name}" for run in formed]
    for detail in details:
        tell(f"well-formed: {detail}")
    if options.reaches("replayed"):
        with failures_of(entry):
            clip = load_weights(entry.card, options.weights)
            details = _with_model(entry, formed, clip, options, resources(), tell)
    return list(zip(entry.runs, details, strict=True))


def _with_model(
    entry: Entry,
    formed: Sequence[Formed],
    clip: Clip,
    options: Options,
    resources: Resources,
    tell: Callable[[str], None],
) -> list[str]:
    """Verify the levels that need the model. Returns the summary of the last level, per run."""
    details = [_replayed(entry, run, clip, options, resources, tell) for run in formed]
    if options.reaches("re-attacked"):
        count, seed = options.draws, options.seed
        details = reattack(
            formed,
            clip,
            resources,
            count=count,
            seed=seed,
            tell=tell,
            surrogate=options.surrogate,
        )
        for i, run in enumerate(formed):
            details[i] += require_recalls(run, clip, resources, count=count, seed=seed, tell=tell)
            details[i] += require_alike(run, clip, resources, count=count, seed=seed, tell=tell)
        for run, detail in zip(formed, details, strict=True):
            tell(f"re-attacked: {run.suite.name}: {detail}")
    if options.reaches("reproduced"):
        details = [_reproduced(run, clip, resources, tell) for run in formed]
    return details


def _replayed(
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
        return f"{detail}; {images}"
    if entry.card.adversarials:
        tell(f"replayed: {name}: the stored images were not replayed; give --adversarials FILE")
    return detail


def _reproduced(
    formed: Formed, clip: Clip, resources: Resources, tell: Callable[[str], None]
) -> str:
    found = reproduce(formed, clip, resources, tell=lambda line: tell(f"reproduced: {line}"))
    theirs = sum(comparison.entry_only for comparison in found)
    ours = sum(comparison.ours_only for comparison in found)
    detail = f"{len(found)} records; samples robust for the entry only {theirs}, here {ours}"
    tell(f"reproduced: {formed.suite.name}: {detail}")
    return detail


@contextmanager
def failures_of(entry: Entry) -> Iterator[None]:
    """Turn every exception of an entry's model into an InputError that names the entry."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # models and their kernels raise anything
        raise InputError(f"The model of '{entry.card.name}' fails: {reason(error)}") from error


def record(entry: Entry, found: list[tuple[Run, str]], level: Level, by: str) -> Path:
    """Add a verified level to ``verification.json``, which lies beside the entries.

    Raises InputError if ``by`` is not plain text.
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
    """What makes a verification unique: a repeated verification replaces the earlier one."""
    return each.entry, each.suite, LEVELS.index(each.level), each.records, each.by


def today() -> str:
    """Today's date in UTC, in ISO format."""
    return datetime.now(UTC).date().isoformat()
