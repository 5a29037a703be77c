"""The model of an entry, loaded as data and never as code."""

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import is_data, load_known


def require_data(spec: str) -> None:
    """Raise InputError for weights that would run code: whoever copies a command would run it."""
    if not is_data(spec):
        raise InputError(
            f"The weights '{spec}' are no architecture or repository that is known here, so they "
            "would have to be a function of some package, which is not run to verify an entry. "
            "Expected weights that are read as data: hf-hub:ORG/REPO, local-dir:PATH or ARCH:FILE."
        )


def load_weights(card: Card, weights: str | None = None) -> Clip:
    """The model that a card is of, from the card's weights or from other ones given.

    Raises InputError if they cannot be had, would run code, or are not those of the card.
    """
    spec = weights or card.weights
    require_data(spec)
    return load_known(spec, card.digest, f"the entry '{card.name}'")
