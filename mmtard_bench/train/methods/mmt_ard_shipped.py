"""``mmt-ard-shipped``: the loss in the published code of the authors of MMT-ARD."""

from pydantic import Field
from torch import Tensor

from mmtard_bench.train.losses import kl_elementwise
from mmtard_bench.train.methods.base import Batch, Loss, Method, Options, away_from
from mmtard_bench.train.towers import Output


class Factors(Options):
    """The factors of the two terms; an earlier state of the authors' code has 60 and 5."""

    robust_factor: float = Field(default=50.0, ge=0)
    clean_factor: float = Field(default=5.0, ge=0)


def confidence(teacher: Output, labels: Tensor) -> Tensor:
    """The teacher's cosine similarity with the true class, (N,)."""
    return teacher.cosine.gather(1, labels[:, None]).squeeze(1)


def weighted_kl(weights: Tensor, teacher: Output, student: Output) -> Tensor:
    """The mean over N and C of w * kl(z_T || z_S), with w (N,) and kl element-wise, (N, C)."""
    return (weights[:, None] * kl_elementwise(teacher.logits, student.logits)).mean()


def loss(batch: Batch, factors: Factors) -> Loss:
    """The mean over batch and classes of two weighted divergences, with the default factors:

    50 * cos_R(x')[y] * kl(z_R(x') || z_S(x')) + 5 * cos_C(x)[y] * kl(z_C(x) || z_S(x)).
    """
    robust, clean = batch.teacher("robust", "adv"), batch.teacher("clean", "clean")
    sure = {role: confidence(t, batch.labels) for role, t in (("robust", robust), ("clean", clean))}
    terms = {
        "kl_robust": weighted_kl(
            factors.robust_factor * sure["robust"], robust, batch.student["adv"]
        ),
        "kl_clean": weighted_kl(
            factors.clean_factor * sure["clean"], clean, batch.student["clean"]
        ),
    }
    return Loss(terms, sure)


METHOD = Method(
    name="mmt-ard-shipped",
    summary="two teachers, weighted by cosine, as in the authors' code",
    views=("clean", "adv"),
    loss=loss,
    targets=lambda _: (("clean", "clean"), ("robust", "adv")),
    guide=lambda _: away_from("clean"),
    options=Factors,
)
