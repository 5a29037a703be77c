"""``mtard``: two teachers, balanced by how fast each loss falls (Zhao et al., ECCV 2022).

Enhanced Accuracy and Robustness via Multi-Teacher Adversarial Distillation. The inner attack, the
targets, the update and its constants are those of the authors' code (zhaoshiji123/MTARD), which has
no temperature (T = 1). Its rate also falls at three late epochs; ours is constant.
"""

from pydantic import Field

from mmtard_bench.train.losses import kl
from mmtard_bench.train.methods.base import CROSS_ENTROPY, Batch, Loss, Method, Softened


class Balance(Softened):
    """How the weights follow the relative losses: see ``robust_weight``."""

    rate: float = Field(default=0.025, gt=0, le=1)
    beta: float = Field(default=1.0, ge=0)


def robust_weight(before: float, robust: float, clean: float, balance: Balance) -> float:
    """The next weight of the robust teacher: r q_R / (q_R + q_C) + (1 - r) ``before``.

    q = (L(t) / L(0))^beta: the teacher whose loss has fallen less gets more. ``robust`` and
    ``clean`` are the relative losses L(t) / L(0); r is ``balance.rate``.
    """
    sides = robust**balance.beta, clean**balance.beta
    share = sides[0] / sum(sides) if sum(sides) else 0.5
    return balance.rate * share + (1 - balance.rate) * before


def loss(batch: Batch, balance: Balance) -> Loss:
    """w KL(z_R(x') || z_S(x')) + (1 - w) KL(z_C(x) || z_S(x)), times T^2; w starts at 1/2.

    z are logits (N, C) divided by the temperature T. No gradient flows through w, which is the same
    for all samples and processes.
    """
    heat = balance.temperature
    apart = {
        "robust": kl(
            batch.teacher("robust", "adv").logits / heat, batch.student["adv"].logits / heat
        ),
        "clean": kl(
            batch.teacher("clean", "clean").logits / heat, batch.student["clean"].logits / heat
        ),
    }
    now = {name: float(batch.gather(values.detach()).mean()) for name, values in apart.items()}
    first = {name: batch.memory.get(f"first_{name}", value) for name, value in now.items()}
    relative = {name: value / first[name] if first[name] else 1.0 for name, value in now.items()}
    weight = robust_weight(batch.memory.get("weight", 0.5), balance=balance, **relative)
    weights = {"robust": weight, "clean": 1 - weight}
    return Loss(
        {f"kl_{name}": weights[name] * heat**2 * apart[name].mean() for name in apart},
        {name: weights[name] * apart[name].new_ones(len(apart[name])) for name in apart},
        {"weight": weight, **{f"first_{name}": value for name, value in first.items()}},
    )


METHOD = Method(
    name="mtard",
    summary="two teachers, balanced by how much of each loss is left",
    views=("clean", "adv"),
    loss=loss,
    targets=lambda _: (("clean", "clean"), ("robust", "adv")),
    guide=lambda _: CROSS_ENTROPY,
    options=Balance,
)
