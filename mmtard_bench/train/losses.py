"""Terms of the training losses: pure functions of logits (N, C) and embeddings (N, D)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy -log softmax(logits)[label] per sample, (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def kl_elementwise(target: Tensor, logits: Tensor) -> Tensor:
    """The terms p (log p - log q) of KL, (N, C), with p = softmax(target), q = softmax(logits)."""
    log_p, log_q = F.log_softmax(target, dim=-1), F.log_softmax(logits, dim=-1)
    return log_p.exp() * (log_p - log_q)


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """The divergence KL(softmax(target) || softmax(logits)) per sample, (N,)."""
    return kl_elementwise(target, logits).sum(-1)


def squared_distance(embedding: Tensor, other: Tensor) -> Tensor:
    """The squared Euclidean distance of embeddings per sample, (N,)."""
    return (embedding.float() - other.float()).square().sum(-1)


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The probability softmax(logits)[label] per sample, (N,)."""
    return torch.softmax(logits, dim=-1).gather(1, labels[:, None]).squeeze(1)
