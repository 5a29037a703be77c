"""``fare``: unsupervised adversarial fine-tuning (Schlarmann et al., 2024, arXiv 2402.12336)."""

from mmtard_bench.train.losses import squared_distance
from mmtard_bench.train.methods.base import (
    AWAY_FROM_ORIGINAL,
    Batch,
    Loss,
    Method,
    Options,
    mean_terms,
)


def loss(batch: Batch, _: Options) -> Loss:
    """|| e_S(x') - e_O(x) ||^2 with O the original model, e unnormalised (N, D): equation 3."""
    original = batch.teacher("original", "clean").embedding
    distance = squared_distance(batch.student["adv"].embedding, original)
    return mean_terms(distance=distance)


METHOD = Method(
    name="fare",
    summary="stay at the original embedding, label-free",
    views=("adv",),
    loss=loss,
    targets=lambda _: (("original", "clean"),),
    guide=lambda _: AWAY_FROM_ORIGINAL,
    labels=False,
    classes=False,
)
