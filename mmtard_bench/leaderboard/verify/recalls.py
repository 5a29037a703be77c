"""Level "re-attacked" for retrieval: the recalls under attack of an entry, at every cutoff.

A draw of images is attacked with the record's attack and another seed. The rank of an image among
all captions follows at once. The rank of a caption among all images would need an attack on all
images; among the drawn images alone it can only be better, so a worse one contradicts the record.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.again import attack_again
from mmtard_bench.evaluation.device import Resources, full_float32
from mmtard_bench.evaluation.sources import chosen
from mmtard_bench.leaderboard.verify.bounds import limit_of_claim, most_false
from mmtard_bench.leaderboard.verify.well_formed import Formed, Place
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.recall import CUTOFFS, Ranks
from mmtard_bench.tasks.prompts import understood
from mmtard_bench.tasks.retrieval import RetrievalScorer

DIRECTIONS = ("image to text", "text to image")


@dataclass(frozen=True)
class Claim:
    """Queries that a record calls answered under attack within ``cutoff`` items.

    Of ``answered`` such queries among ``total``, ``drawn`` were looked at, and a new attack ended
    beyond the cutoff for ``missed`` of them.
    """

    direction: str
    cutoff: int
    total: int
    answered: int
    drawn: int
    missed: int

    @property
    def overstated(self) -> float:
        """The one-sided upper 95% bound on claimed minus found recall, in [0, 1]."""
        return most_false(self.answered, self.drawn, self.missed) / self.total

    @property
    def line(self) -> str:
        """What was found, in words."""
        return (
            f"{self.direction} at {self.cutoff}, {self.missed} of {self.drawn} claims missed by a "
            "new attack"
        )


def require_recalls(
    formed: Formed,
    clip: Clip,
    resources: Resources,
    *,
    count: int,
    seed: int,
    tell: Callable[[str], None],
) -> str:
    """Check the recalls under attack of every retrieval record of a run.

    Returns:
        A summary; "" for a run without retrieval.

    Raises:
        InputError: If a new attack misses more claims than an honest entry explains; see
            ``bounds.HONEST_RANKS``.
    """
    places = [place for place in formed.places if place.data.task.metric == "retrieval"]
    most = 0.0
    for place in places:
        claims = attack_recalls(place, clip, resources, count=count, seed=seed)
        worst = max(claims, key=lambda claim: claim.overstated)
        most = max(most, worst.overstated)
        where = f"{formed.suite.name}, {place.name}"
        tell(
            f"re-attacked: {where}: recalls overstated by at most {100 * worst.overstated:.1f} "
            f"points (95%): {worst.line}"
        )
        for claim in claims:
            if claim.missed > limit_of_claim(claim.drawn, len(claims) * len(places)):
                raise InputError(
                    f"{where}: {claim.line}. The entry overstates its recalls under attack."
                )
    return f"; recalls overstated by at most {100 * most:.1f} points (95%)" if places else ""


def attack_recalls(
    place: Place, clip: Clip, resources: Resources, *, count: int, seed: int
) -> list[Claim]:
    """Attack ``count`` random images of a retrieval record and compare its claims with ranks."""
    record = place.record
    ids = [sample.id for sample in record.samples]
    chance = random.Random(f"{seed}|{place.name}|recalls")
    drawn = chance.sample(ids, min(count, len(ids)))
    found = _ranks(place, clip, resources, drawn, seed=chance.getrandbits(32))
    claimed = {sample.id: sample.ranks for sample in record.samples if sample.ranks is not None}
    claims = []
    for direction in DIRECTIONS:
        theirs, ours = _queries(claimed, direction), _queries(found, direction)
        for cutoff in CUTOFFS:
            answered = {query for query, rank in theirs.items() if rank <= cutoff}
            looked = answered & ours.keys()
            missed = sum(ours[query] > cutoff for query in looked)
            claims.append(Claim(direction, cutoff, len(theirs), len(answered), len(looked), missed))
    return claims


def _ranks(
    place: Place, clip: Clip, resources: Resources, ids: Sequence[str], *, seed: int
) -> dict[str, Ranks]:
    """The ranks of drawn images among all captions, and of their captions among drawn images."""
    data = chosen(place.data, ids)
    outcomes = list(
        attack_again(clip, data, place.threat, resources, seed=seed, engine=place.engine)
    )
    with full_float32():
        scorer = RetrievalScorer(clip, understood(clip, data), resources.device)
        pairs = {o.id: (o.verdict.embedding, o.verdict.embedding) for o in outcomes}
        captions = scorer.caption_ranks(pairs)
    return {
        o.id: Ranks(image=(o.verdict.rank or 1, o.verdict.rank or 1), captions=captions[o.id])
        for o in outcomes
    }


def _queries(ranks: dict[str, Ranks], direction: str) -> dict[object, int]:
    """The rank under attack of each query: as everywhere, none is better than the clean one."""
    if direction == DIRECTIONS[0]:
        return {name: max(own.image) for name, own in ranks.items()}
    return {place: max(pair) for own in ranks.values() for place, *pair in own.captions}
