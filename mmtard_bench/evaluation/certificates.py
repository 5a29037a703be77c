"""When the answers of teachers certify the answer of a student: docs/explanation/transfer-bound.md.

Pure functions of log-probabilities (N, C). A certificate is a slack, (N,): where it is positive,
the student's answer is the true class.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.attacks.base import margin


class Answers(NamedTuple):
    """Log-probabilities (N, C), ``log_p`` of teachers and ``log_q`` of a student; labels (N,)."""

    log_p: Tensor
    log_q: Tensor
    labels: Tensor


Slack = Callable[[Answers], Tensor]
"""Answers -> the slack of a certificate, (N,)."""

SMOOTH = 1e-12
"""Keeps the slope of the square root finite where both answers agree. It lowers a slack by 1e-6."""


def log_mixture(teachers: Sequence[tuple[float, Tensor]], *, temperature: float) -> Tensor:
    """log(sum of w p), (N, C), of teachers given as a weight w > 0 and logits (N, C) each.

    The weights add up to one. Logits are divided by ``temperature`` before the softmax.
    """
    parts = [
        F.log_softmax(logits / temperature, dim=1) + math.log(weight) for weight, logits in teachers
    ]
    return torch.stack(parts).logsumexp(0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, (N,)."""
    # Rounding may leave a sum of zero slightly below it.
    return (log_p.exp() * (log_p - log_q)).sum(1).clamp_min(0)


def least_divergence(log_p: Tensor, labels: Tensor) -> Tensor:
    """The least KL(p || q) over all q that do not prefer the true class, in nats, (N,).

    With a = p[y] and the runner-up b it is a ln(2a / (a + b)) + b ln(2b / (a + b)), and zero where
    p itself does not prefer the true class.
    """
    down = -margin(log_p, labels).clamp_min(0)
    ratio = down.exp()  # b / a
    true = log_p.gather(1, labels[:, None]).squeeze(1).exp()
    return true * (ratio * down - (1 + ratio) * torch.log1p((ratio - 1) / 2))


def pinsker(answers: Answers) -> Tensor:
    """m_T - sqrt(2 KL(p || q)), (N,): by Pinsker's inequality at most the student's margin."""
    log_p, log_q, labels = answers
    return margin(log_p.exp(), labels) - (2 * divergence(log_p, log_q)).sqrt()


def smooth_pinsker(answers: Answers) -> Tensor:
    """``pinsker`` for gradients: its slope is finite where both answers agree, (N,)."""
    log_p, log_q, labels = answers
    return margin(log_p.exp(), labels) - (2 * divergence(log_p, log_q) + SMOOTH).sqrt()


def exact_in_kl(answers: Answers) -> Tensor:
    """The least divergence at which a student can err, minus the student's, (N,), in nats."""
    log_p, log_q, labels = answers
    return least_divergence(log_p, labels) - divergence(log_p, log_q)


def total_variation(answers: Answers) -> Tensor:
    """m_T - |p - q|_1, (N,): at most the student's margin."""
    log_p, log_q, labels = answers
    p, q = log_p.exp(), log_q.exp()
    return margin(p, labels) - (p - q).abs().sum(1)


CERTIFICATES: dict[str, Slack] = {
    "total variation": total_variation,
    "exact in KL": exact_in_kl,
    "Pinsker": pinsker,
}
"""The loosest is the last: where Pinsker's slack is positive, the other two are."""
