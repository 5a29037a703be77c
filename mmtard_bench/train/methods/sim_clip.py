"""``sim-clip``: Siamese adversarial fine-tuning, label-free (Hossain and Imteaj, arXiv 2407.14971).

This is the loss that the paper describes: both branches are the student. The authors' code
(speedlab-git/SimCLIP) puts the frozen original model in place of the clean branch, so that one of
its two terms has no gradient, and the other is FARE with cosine similarity.
"""

import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.train.methods.base import (
    AWAY_FROM_ORIGINAL,
    Batch,
    Loss,
    Method,
    Options,
    mean_terms,
)


def towards(moving: Tensor, still: Tensor) -> Tensor:
    """-cos(moving, still) per sample, (N,), from embeddings (N, D); no gradient to ``still``."""
    return -F.cosine_similarity(moving, still.detach(), dim=-1)


def loss(batch: Batch, _: Options) -> Loss:
    """-1/2 cos(e_S(x'), stop(e_S(x))) - 1/2 cos(e_S(x), stop(e_S(x'))), e embeddings (N, D).

    The inner attack maximises the squared distance to the original embedding, as that of FARE.
    """
    adv, clean = batch.student["adv"].embedding, batch.student["clean"].embedding
    return mean_terms(adv=towards(adv, clean) / 2, clean=towards(clean, adv) / 2)


METHOD = Method(
    name="sim-clip",
    summary="Siamese: clean and adversarial embeddings attract each other, label-free",
    views=("clean", "adv"),
    loss=loss,
    guide=lambda _: AWAY_FROM_ORIGINAL,
    labels=False,
    classes=False,
)
