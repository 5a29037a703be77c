"""Load the model of an entry from files of weights, without running code of the entry."""

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_known
from mmtard_bench.models.specs import is_data


def require_data(spec: str) -> None:
    """Raise InputError for a spec that would run code of its author."""
    if not is_data(spec):
        raise InputError(
            f"The weights '{spec}' name neither a known architecture nor a repository, so they "
            "could only be a Python function. Verification does not run code of an entry. "
            "Expected weights that are read as data: hf-hub:ORG/REPO, local-dir:PATH or ARCH:FILE."
        )


def load_weights(card: Card, weights: str | None = None) -> Clip:
    """Load the model of a card.

    Args:
        card: The model card.
        weights: A model spec to load instead of the card's weights; default: the card's.

    Returns:
        The model, with the digest that the card names.

    Raises:
        InputError: If the weights cannot be loaded, would run code, or have another digest.
    """
    spec = weights or card.weights
    require_data(spec)
    return load_known(spec, card.digest, f"the entry '{card.name}'")
