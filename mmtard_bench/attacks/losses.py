"""Losses that attacks maximise: per sample, from logits (N, C); larger is better for the attacker.

Differences of logits are used where a loss would need more classes than there are: DLR divides by
the gap between the first and the third logit, its targeted form by one that needs the fourth
(Croce and Hein, 2020, section 4.1).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.attacks.base import margin

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (N, C), labels (N,), target classes (N,) -> the loss that the attack maximises, (N,)."""

TINY = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy with the true class."""
    return F.cross_entropy(logits, labels, reduction="none")


def negative_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The best other logit minus the true one (Carlini and Wagner, 2017)."""
    return -margin(logits, labels)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The difference of logits ratio towards a target class; needs four classes."""
    top = logits.topk(4, dim=1).values
    width = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])
    return target_gap(logits, labels, targets) / (width + TINY)


def target_gap(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the true one."""
    pair = logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])
    return pair.squeeze(1)
