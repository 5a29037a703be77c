"""Carlini and Wagner's (2017) L2 attack: ``torchattacks.CW`` inside a search over c."""

import torch
from torch import Tensor, nn

from mmtard_bench.attacks.base import Attack, AttackResult, CountPasses, Work, norm_of
from mmtard_bench.attacks.reference import BLOCK, share
from mmtard_bench.errors import InputError
from mmtard_bench.registry import register_attack
from mmtard_bench.types import ThreatModel

SEARCHES = 9
STEPS = 200
LEARNING_RATE = 0.01
FIRST_C = 1e-2


def minimal_l2(
    model: nn.Module, images: Tensor, labels: Tensor, *, good_enough: float = 0.0
) -> Tensor:
    """Look for the closest adversarial image of each sample: (N, 3, H, W).

    c starts at 0.01, grows tenfold until it succeeds, then is bisected, nine rounds in all. A
    sample leaves the search once its distance is at most ``good_enough``. Samples that no c
    broke come back unchanged.
    """
    # Imported on use: torchattacks brings a second's worth of other attacks with it.
    from mmtard_bench.attacks.weighted_cw import WeightedCW

    best = images.clone()
    distance = torch.full((len(images),), float("inf"), device=images.device)
    lower = torch.zeros(len(images), device=images.device)
    upper = torch.full_like(lower, float("inf"))
    c = torch.full_like(lower, FIRST_C)
    for _ in range(SEARCHES):
        left = (distance > good_enough).nonzero().squeeze(1)
        if not len(left):
            break
        found = WeightedCW(model, c[left], steps=STEPS, lr=LEARNING_RATE)(
            images[left], labels[left]
        )
        moved = norm_of(found - images[left], "l2")
        success = moved > 0
        closer = success & (moved < distance[left])
        best[left[closer]] = found[closer]
        distance[left[closer]] = moved[closer]
        upper[left[success]] = torch.minimum(upper[left], c[left])[success]
        lower[left[~success]] = torch.maximum(lower[left], c[left])[~success]
        c = torch.where(upper.isinf(), c * 10, (lower + upper) / 2)
    return best


@register_attack("cw-l2")
def build_cw_l2(threat: ThreatModel, n_classes: int) -> Attack:
    """Minimal L2 with a search over c; broken if the distance found is within eps."""
    if threat.norm != "l2":
        raise InputError(f"The attack cw-l2 works in the norm l2; '{threat.norm}' was given.")
    eps = float(threat.eps)

    def run(work: Work) -> AttackResult:
        images, count = work.images, len(work.ids)
        counter = CountPasses(work.model).eval()
        found = minimal_l2(counter, images, work.labels, good_enough=eps)
        distance = norm_of(found - images, "l2")
        broken = (distance > 0) & (distance <= eps)
        found[~broken] = images[~broken]
        return AttackResult(
            adversarial=found,
            broken_by=[threat.attack if b else None for b in broken.tolist()],
            forward=share(counter.forward_rows, count),
            backward=share(counter.backward_rows, count),
        )

    parameters: dict[str, str | int | float] = {
        "code": "torchattacks, no early stop",
        "searches": SEARCHES,
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "first_c": FIRST_C,
    }
    passes = 2 * SEARCHES * STEPS
    return Attack(threat.attack, parameters, run, block=BLOCK, passes=passes)
