"""Pieces of the losses: pure functions of logits (N, C) and embeddings (N, D)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def kl_elementwise(target: Tensor, logits: Tensor) -> Tensor:
    """p (log p - log q) with p = softmax(target), q = softmax(logits): (N, C)."""
    log_p, log_q = F.log_softmax(target, dim=-1), F.log_softmax(logits, dim=-1)
    return log_p.exp() * (log_p - log_q)


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)), (N,)."""
    return kl_elementwise(target, logits).sum(-1)


def squared_distance(embedding: Tensor, other: Tensor) -> Tensor:
    """The squared Euclidean distance of embeddings, (N,)."""
    return (embedding.float() - other.float()).square().sum(-1)


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits)[label], (N,)."""
    return torch.softmax(logits, dim=-1).gather(1, labels[:, None]).squeeze(1)
