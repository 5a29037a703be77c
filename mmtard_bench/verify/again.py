"""Re-attacked: some of the samples that an entry calls robust, drawn at random, attacked afresh."""

import random
from dataclasses import dataclass

from mmtard_bench.errors import InputError
from mmtard_bench.job import FAST
from mmtard_bench.models.clip import Clip
from mmtard_bench.reattack import Ball, attack_again, balls_of, chosen
from mmtard_bench.resources import Resources
from mmtard_bench.verify.bounds import allowed, caught, most_false
from mmtard_bench.verify.formed import Formed, Place

POINTS = 0.10
"""The overstatement whose chance of being caught is said."""


@dataclass(frozen=True)
class Draw:
    """What became of ``drawn`` of the ``robust`` samples of a ball; it has n samples in all."""

    where: str
    attack: str
    n: int
    robust: int
    drawn: int
    fell: tuple[str, ...]

    @property
    def allowed(self) -> int:
        """How many may fall."""
        return allowed(self.drawn)

    @property
    def overstated(self) -> float:
        """The upper one-sided 95% bound on claimed less true accuracy, in [0, 1]."""
        return most_false(self.robust, self.drawn, len(self.fell)) / self.n

    @property
    def line(self) -> str:
        """The draw for a person."""
        text = f"{self.where}: {len(self.fell)} of {self.drawn} fell to {self.attack}"
        text += f" (of {self.robust} called robust; {self.allowed} may fall)"
        text += f"; overstated by at most {100 * self.overstated:.1f} points (95%)"
        false = round(POINTS * self.n)
        if false > self.robust:
            return text
        chance = caught(self.robust, self.drawn, false)
        return f"{text}; {100 * POINTS:.0f} points would be caught with {chance:.1%}"


def draw(ids: list[str], count: int, *, seed: int, where: str) -> list[str]:
    """So many of the ids, all if there are fewer, by a seed and the ball that they are of."""
    return random.Random(f"{seed}|{where}").sample(ids, min(count, len(ids)))


def attack_draws(
    ball: Ball, place: Place, clip: Clip, resources: Resources, *, count: int, seed: int
) -> Draw:
    """Attack some samples that stand in a ball with its strongest attack and another seed.

    ``place`` is the strongest attack's.
    """
    where = f"{ball.task} {ball.name}"
    ids = draw(ball.standing, count, seed=seed, where=where)
    # A seed that the record's author could not look up.
    other = random.Random(f"{seed}|attack").randrange(2**32)
    outcomes = (
        attack_again(
            clip, chosen(place.data, ids), place.threat, resources, seed=other, engine=FAST
        )
        if ids
        else ()
    )
    # One that is wrong on the clean image is not robust either.
    fell = tuple(each.id for each in outcomes if each.broken or each.before != each.label)
    return Draw(
        where=where,
        attack=place.threat.attack,
        n=len(place.data.labels),
        robust=len(ball.standing),
        drawn=len(ids),
        fell=fell,
    )


def places_of(formed: Formed) -> list[tuple[Ball, Place]]:
    """The balls of a run, each with the place of its strongest attack."""
    places = {id(place.record): place for place in formed.places}
    return [(ball, places[id(ball.strongest)]) for ball in balls_of(formed.run.records)]


def require_few(draw: Draw) -> None:
    """Raise InputError if more samples fell than another seed explains."""
    if len(draw.fell) > draw.allowed:
        raise InputError(
            f"{draw.where}: {len(draw.fell)} of {draw.drawn} samples that the entry calls robust "
            f"fell to {draw.attack} with another seed, '{draw.fell[0]}' for one; at most "
            f"{draw.allowed} may, so the entry overstates its robustness."
        )
