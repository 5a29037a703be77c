"""Level "re-attacked": attack a random draw of an entry's robust samples by other means.

The strongest attack of the suite runs with another seed. Where it is on pixels of classification,
Square follows, which needs no gradients, and then images made with other gradients (``transfer``).
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.again import attack_again
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.job import FAST
from mmtard_bench.evaluation.sources import chosen
from mmtard_bench.leaderboard.verify.bounds import (
    caught,
    limit_of_ball,
    limit_of_entry,
    most_false,
    size_of_second,
    unsuspicious,
)
from mmtard_bench.leaderboard.verify.transfer import broken_by_others
from mmtard_bench.leaderboard.verify.well_formed import Formed, Place
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_model
from mmtard_bench.records.worst import Ball, balls_of
from mmtard_bench.types import ThreatModel

POINTS = 0.10
"""The overstatement of robust accuracy for which messages state the probability of detection."""

SQUARE = "square-500"
"""The second attack of a re-attack: it needs no gradients."""

SURROGATES = {"digits": "teacher-clean"}
"""Undefended models that ship, by the data that they know."""


@dataclass(frozen=True)
class Draw:
    """A draw of ``ids`` from the ``robust`` samples of a ball that has ``n`` samples.

    The re-attack broke the ids in ``broken``.
    """

    where: str
    attack: str
    n: int
    robust: int
    ids: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def suspicious(self) -> bool:
        """Whether a second draw is made: more samples are broken than one ball may have."""
        return len(self.broken) > unsuspicious(len(self.ids))

    @property
    def overstated(self) -> float:
        """The one-sided upper 95% bound on claimed minus true robust accuracy, in [0, 1]."""
        return most_false(self.robust, len(self.ids), len(self.broken)) / self.n

    def line(self, balls: int) -> str:
        """A message about the first draw of a ball, in an entry with ``balls`` balls."""
        drawn = len(self.ids)
        text = f"{self.where}: {len(self.broken)} of {drawn} broken by {self.attack}"
        text += f" (drawn from {self.robust} robust; more than {unsuspicious(drawn)} "
        text += "lead to a second draw); "
        text += f"overstated by at most {100 * self.overstated:.1f} points (95%)"
        false = round(POINTS * self.n)
        if false > self.robust:
            return text
        chance = caught(self.robust, drawn, false, balls)
        return f"{text}; {100 * POINTS:.0f} points would be caught with {chance:.1%}"


def reattack(
    runs: Sequence[Formed],
    clip: Clip,
    resources: Resources,
    *,
    count: int,
    seed: int,
    tell: Callable[[str], None],
    surrogate: str | None = None,
) -> list[str]:
    """Re-attack ``count`` random robust samples per task and ball of an entry's runs.

    ``surrogate`` is the spec of another model, whose adversarial images are tried as well; default:
    that of ``SURROGATES``, if there is one for the data.

    Returns:
        A summary per run.

    Raises:
        InputError: If more samples are broken than another seed explains, in one ball or in all
            balls together. An honest entry is refused with a probability of at most 1%; see
            ``bounds``.
    """
    balls = [(run, *place) for run in runs for place in places_of(run)]
    means = Means(clip, resources, seed, cache(load_model), surrogate)
    draws: list[Draw] = []
    started = time.monotonic()
    for done, (run, ball, place) in enumerate(balls, 1):
        where = f"{run.suite.name}, {ball.task} {ball.name}"
        ids = draw(ball.robust, count, seed=seed, where=where)
        draws.append(_attacked(ball, place, means, ids, where))
        left = (time.monotonic() - started) / done * (len(balls) - done)
        line = f"re-attacked: {draws[-1].line(len(balls))}"
        tell(line + (f" (about {left:.0f} s left)" if left > 20 else ""))
    require_few(draws)
    for first, (_, ball, place) in zip(draws, balls, strict=True):
        if not first.suspicious:
            continue
        rest = [name for name in ball.robust if name not in first.ids]
        ids = draw(
            rest,
            size_of_second(first.robust, len(first.ids)),
            seed=seed,
            where=f"{first.where}, second draw",
        )
        again = _attacked(ball, place, means, ids, first.where)
        if ids:
            found = f"{len(again.broken)} of {len(ids)} broken by {first.attack}"
            tell(f"re-attacked: {first.where}: second draw: {found}")
        require_few_in_ball(first, again, balls=len(balls))
    return [
        _summary([d for d, (of, *_) in zip(draws, balls, strict=True) if of is run], seed)
        for run in runs
    ]


def draw(ids: list[str], count: int, *, seed: int, where: str) -> list[str]:
    """At most ``count`` of the ids, drawn by the seed and the ball's name."""
    return random.Random(f"{seed}|{where}").sample(ids, min(count, len(ids)))


@dataclass(frozen=True)
class Means:
    """What a re-attack has: the model, where it runs, a seed, and another model if one is given."""

    clip: Clip
    resources: Resources
    seed: int
    load: Callable[[str], Clip]
    surrogate: str | None

    def other(self, place: Place) -> Clip | None:
        """The model whose adversarial images are tried."""
        spec = self.surrogate or SURROGATES.get(place.data.task.data.partition("/")[0])
        return None if spec is None else self.load(spec)


def _attacked(ball: Ball, place: Place, means: Means, ids: list[str], where: str) -> Draw:
    """Re-attack samples of a ball by all means, each on what is left robust by those before."""
    # The author of the record cannot know this seed in advance.
    seed = random.Random(f"{means.seed}|attack").randrange(2**32)
    threats = _threats(ball, place)
    broken: list[str] = []
    for threat in threats:
        left = [name for name in ids if name not in broken]
        if left:
            data = chosen(place.data, left)
            found = attack_again(means.clip, data, threat, means.resources, seed=seed, engine=FAST)
            # A sample whose clean image is misclassified is not robust either.
            broken += [each.id for each in found if each.broken or each.before != each.label]
    names = [threat.attack for threat in threats]
    left = [name for name in ids if name not in broken]
    if SQUARE in names:
        names.append("other gradients")
    if SQUARE in names and left:
        data, other = chosen(place.data, left), means.other(place)
        broken += broken_by_others(
            means.clip, data, place.threat, means.resources, surrogate=other, seed=seed
        )
    return Draw(
        where=where,
        attack=" and ".join(names),
        n=len(place.data.labels),
        robust=len(ball.robust),
        ids=tuple(ids),
        broken=tuple(broken),
    )


def _threats(ball: Ball, place: Place) -> list[ThreatModel]:
    """The strongest threat model of a ball, with Square beside it for classification of pixels."""
    pixels = not ball.edits and place.threat.norm != "levenshtein"
    if not pixels or place.data.task.metric == "retrieval":
        return [place.threat]
    return [place.threat, replace(place.threat, attack=SQUARE)]


def places_of(formed: Formed) -> list[tuple[Ball, Place]]:
    """The balls of a run, each with the record of its strongest attack."""
    places = {id(place.record): place for place in formed.places}
    return [(ball, places[id(ball.strongest)]) for ball in balls_of(formed.run.records)]


def require_few(draws: Sequence[Draw]) -> None:
    """Raise InputError if all first draws together have too many broken samples."""
    broken = [(draw.where, name) for draw in draws for name in draw.broken]
    drawn = sum(len(draw.ids) for draw in draws)
    if len(broken) > limit_of_entry(drawn):
        raise InputError(
            f"{len(broken)} of {drawn} samples that the entry calls robust are broken with another "
            f"seed, '{broken[0][1]}' of {broken[0][0]} for example; at most "
            f"{limit_of_entry(drawn)} are allowed in all balls together. The entry overstates its "
            "robustness."
        )


def require_few_in_ball(first: Draw, second: Draw, *, balls: int) -> None:
    """Raise InputError if both draws of a ball together have too many broken samples."""
    broken, drawn = [*first.broken, *second.broken], len(first.ids) + len(second.ids)
    limit = limit_of_ball(drawn, balls)
    if len(broken) > limit:
        raise InputError(
            f"{first.where}: {len(broken)} of {drawn} samples that the entry calls robust are "
            f"broken by {first.attack} with another seed, '{broken[0]}' for example; at most "
            f"{limit} are allowed. The entry overstates its robustness."
        )


def _summary(draws: Sequence[Draw], seed: int) -> str:
    broken, drawn = sum(len(d.broken) for d in draws), sum(len(d.ids) for d in draws)
    return (
        f"seed {seed}: {broken} of {drawn} samples broken; overstated by at most "
        f"{100 * max(d.overstated for d in draws):.1f} points in a task and ball (95%)"
    )
