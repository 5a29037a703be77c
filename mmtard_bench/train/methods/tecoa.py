"""``tecoa``: text-guided contrastive adversarial training (Mao et al., 2023, arXiv 2212.07016)."""

from mmtard_bench.train.losses import cross_entropy
from mmtard_bench.train.methods.base import (
    CROSS_ENTROPY,
    Batch,
    Loss,
    Method,
    Options,
    mean_terms,
)


def loss(batch: Batch, _: Options) -> Loss:
    """CE(z_S(x'), y) with logits (N, C) of normalised embeddings and frozen text (section 3.2)."""
    return mean_terms(cross_entropy=cross_entropy(batch.student["adv"].logits, batch.labels))


METHOD = Method(
    name="tecoa",
    summary="cross-entropy on adversarial images",
    views=("adv",),
    loss=loss,
    guide=lambda _: CROSS_ENTROPY,
)
