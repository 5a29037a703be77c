"""Ranks of a retrieval record, and the recalls that follow from them."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Protocol

from pydantic import Field

from mmtard_bench.schema import Strict

CUTOFFS = (1, 5, 10)
"""Recall is given at these numbers of retrieved items."""

Rank = Annotated[int, Field(ge=1)]
Place = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = tuple[Share, Share, Share]


class Ranks(Strict):
    """Where the first matching item of each query of a sample stands, from 1.

    ``image`` is (clean, adversarial): its best caption among all captions. ``captions`` has for
    each of its distinct captions (place in the gallery, clean, adversarial): the best image of that
    caption among all images. A non-matching item with the same score stands before.
    """

    image: tuple[Rank, Rank]
    captions: tuple[tuple[Place, Rank, Rank], ...]


class Recalls(Strict):
    """Recall at 1, 5 and 10, recomputed from the samples on every read.

    A query counts as answered under attack only if it is answered on the clean images, too.
    """

    image_to_text: Shares
    image_to_text_attacked: Shares
    text_to_image: Shares
    text_to_image_attacked: Shares
    captions: Annotated[int, Field(ge=1)]


class Ranked(Protocol):
    """What recalls are computed from: a sample of a record."""

    @property
    def id(self) -> str: ...
    @property
    def label(self) -> int: ...
    @property
    def robust(self) -> bool: ...
    @property
    def ranks(self) -> Ranks | None: ...


def recalls_of(samples: Iterable[Ranked]) -> Recalls | None:
    """The recalls of a record; None for samples without ranks.

    A caption that several images share is one query. At 1, an image whose attack was not confirmed
    counts as broken, as everywhere.
    """
    images: list[tuple[int, int]] = []
    captions: dict[int, tuple[int, int]] = {}
    for sample in samples:
        if sample.ranks is None:
            return None
        clean, attacked = sample.ranks.image
        images.append((clean, max(attacked, 1 if sample.robust else 2)))
        captions.update((place, (c, a)) for place, c, a in sample.ranks.captions)
    if not captions:
        return None
    queries = list(captions.values())
    return Recalls(
        image_to_text=_shares([clean for clean, _ in images]),
        image_to_text_attacked=_shares([max(pair) for pair in images]),
        text_to_image=_shares([clean for clean, _ in queries]),
        text_to_image_attacked=_shares([max(pair) for pair in queries]),
        captions=len(queries),
    )


def require_ranks(samples: Sequence[Ranked], gallery: int | None) -> None:
    """Raise ValueError unless ranks are whole and agree with each other.

    ``gallery`` is the number of captions of a retrieval record, None for another: that has none.
    """
    queries: dict[int, tuple[int, int]] = {}
    for sample in samples:
        if (sample.ranks is not None) != (gallery is not None):
            raise ValueError(f"sample {sample.id}: ranks belong to retrieval, and to all of it")
        if sample.ranks is None or gallery is None:
            continue
        places = [place for place, _, _ in sample.ranks.captions]
        if sample.label not in places or max(places) >= gallery:
            raise ValueError(f"sample {sample.id}: its captions are not the gallery's")
        if max(sample.ranks.image) > gallery:
            raise ValueError(f"sample {sample.id}: a rank is beyond the gallery")
        for place, clean, attacked in sample.ranks.captions:
            if queries.setdefault(place, (clean, attacked)) != (clean, attacked):
                raise ValueError(f"caption {place} has two ranks")
            if max(clean, attacked) > len(samples):
                raise ValueError(f"caption {place}: a rank is beyond the images")
    if gallery is not None and len(queries) != gallery:
        raise ValueError("some captions of the gallery have no rank")


def _shares(ranks: Sequence[int]) -> Shares:
    first, second, third = (sum(rank <= k for rank in ranks) / len(ranks) for k in CUTOFFS)
    return first, second, third
