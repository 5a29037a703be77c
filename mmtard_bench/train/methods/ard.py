"""``ard``: adversarial robust distillation from one robust teacher.

This is the single-teacher baseline of MMT-ARD, as in the ``_origin`` script of its authors. That
script has no temperature (T = 1).
"""

from mmtard_bench.train.losses import kl
from mmtard_bench.train.methods.base import Batch, Loss, Method, Softened, away_from, mean_terms


def loss(batch: Batch, options: Softened) -> Loss:
    """T^2 KL(z_R(x) / T || z_S(x') / T), logits (N, C). Needs no labels.

    The inner attack maximises KL(z_R(x) || z_S(x')).
    """
    heat = options.temperature
    target, logits = batch.teacher("robust", "clean").logits, batch.student["adv"].logits
    return mean_terms(kl_robust=heat**2 * kl(target / heat, logits / heat))


METHOD = Method(
    name="ard",
    summary="one robust teacher",
    views=("adv",),
    loss=loss,
    targets=lambda _: (("robust", "clean"),),
    guide=lambda _: away_from("robust"),
    labels=False,
    options=Softened,
)
