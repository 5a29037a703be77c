"""``ard``: adversarial robust distillation from one robust teacher.

The single-teacher baseline of MMT-ARD: what the ``_origin`` script of its authors computes.
"""

from mmtard_bench.train.losses import kl
from mmtard_bench.train.methods.base import Batch, Loss, Method, Options, away_from, mean_terms


def loss(batch: Batch, _: Options) -> Loss:
    """KL(z_R(x) || z_S(x')), logits (N, C); x' maximises the same. Label-free."""
    target = batch.teacher("robust", "clean").logits
    return mean_terms(kl_robust=kl(target, batch.student["adv"].logits))


METHOD = Method(
    name="ard",
    summary="one robust teacher",
    views=("adv",),
    loss=loss,
    targets=lambda _: (("robust", "clean"),),
    guide=lambda _: away_from("robust"),
    labels=False,
)
