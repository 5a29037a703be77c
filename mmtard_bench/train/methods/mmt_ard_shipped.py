"""``mmt-ard-shipped``: what the published code of MMT-ARD's authors computes."""

from torch import Tensor

from mmtard_bench.train.losses import kl_elementwise
from mmtard_bench.train.methods.base import Batch, Loss, Method, Options, away_from
from mmtard_bench.train.towers import Output

ROBUST, CLEAN = 50.0, 5.0


def weighted_kl(teacher: Output, student: Output, labels: Tensor, factor: float) -> Tensor:
    """mean over N and C of factor * cos_T[y] * kl(z_T || z_S), kl element-wise, (N, C).

    cos_T[y] is the teacher's cosine similarity with the true class, (N,): its confidence.
    """
    confidence = teacher.cosine.gather(1, labels[:, None])
    return (factor * confidence * kl_elementwise(teacher.logits, student.logits)).mean()


def loss(batch: Batch, _: Options) -> Loss:
    """The mean over batch and classes of two weighted divergences, scalars:

    50 * cos_R(x')[y] * kl(z_R(x') || z_S(x')) + 5 * cos_C(x)[y] * kl(z_C(x) || z_S(x)).
    """
    robust, clean = batch.teacher("robust", "adv"), batch.teacher("clean", "clean")
    labels = batch.labels
    weights = {
        "robust": robust.cosine.gather(1, labels[:, None]).squeeze(1),
        "clean": clean.cosine.gather(1, labels[:, None]).squeeze(1),
    }
    terms = {
        "kl_robust": weighted_kl(robust, batch.student["adv"], labels, ROBUST),
        "kl_clean": weighted_kl(clean, batch.student["clean"], labels, CLEAN),
    }
    return Loss(terms, weights)


METHOD = Method(
    name="mmt-ard-shipped",
    summary="two teachers, weighted by cosine, as in the authors' code",
    views=("clean", "adv"),
    loss=loss,
    targets=lambda _: (("clean", "clean"), ("robust", "adv")),
    guide=lambda _: away_from("clean"),
)
