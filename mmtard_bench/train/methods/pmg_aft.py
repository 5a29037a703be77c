"""``pmg-aft``: pre-trained model guided adversarial fine-tuning (Wang et al., 2024, 2401.04350)."""

from mmtard_bench.train.losses import cross_entropy, kl
from mmtard_bench.train.methods.base import (
    CROSS_ENTROPY,
    Batch,
    Loss,
    Method,
    Options,
    mean_terms,
)


def loss(batch: Batch, _: Options) -> Loss:
    """CE(z_S(x'), y) + KL(z_O(x') || z_S(x')) + KL(z_S(x) || z_S(x')), O the original model.

    Logits are (N, C). The gradient flows through both sides of the last term. Both coefficients
    are 1, the paper's choice.
    """
    adv, clean = batch.student["adv"].logits, batch.student["clean"].logits
    return mean_terms(
        cross_entropy=cross_entropy(adv, batch.labels),
        kl_original=kl(batch.teacher("original", "adv").logits, adv),
        kl_clean=kl(clean, adv),
    )


METHOD = Method(
    name="pmg-aft",
    summary="TeCoA, held near the original model and the student's own clean output",
    views=("clean", "adv"),
    loss=loss,
    targets=lambda _: (("original", "adv"),),
    guide=lambda _: CROSS_ENTROPY,
)
