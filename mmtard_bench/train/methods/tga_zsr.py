"""``tga-zsr``: text-guided attention for zero-shot robustness (Yu et al., 2024, arXiv 2410.21802).

The maps and the constants are those of the authors' code (zhyblue424/TGA-ZSR).
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmtard_bench.train.losses import cross_entropy
from mmtard_bench.train.methods.base import (
    CROSS_ENTROPY,
    Batch,
    Loss,
    Method,
    Options,
    mean_terms,
)
from mmtard_bench.train.towers import Output


class Factors(Options):
    """The factors of the two attention terms: ``refine`` is alpha, ``constrain`` is beta."""

    refine: float = Field(default=0.08, ge=0)
    constrain: float = Field(default=0.05, ge=0)


def attention(output: Output, labels: Tensor) -> Tensor:
    """How much each pixel speaks for the true class: maps (N, H * W), from 0 to 1.

    The products of the patch embeddings with the class embedding are scaled to [0, 1] in each image
    and resized to the model's input size. As in the authors' code, each dimension of the embeddings
    is first divided by its norm over all tokens of the image, the class token among them.
    """
    found = output.patches
    assert found is not None
    with torch.autocast(output.embedding.device.type, enabled=False):
        tokens = torch.cat([output.embedding[:, None], found.embeddings], dim=1).float()
        patches = (tokens / tokens.norm(dim=1, keepdim=True).clamp_min(1e-12))[:, 1:]
        products = (patches @ output.head.embeddings[labels][:, :, None]).squeeze(-1)
        low, high = products.amin(1, keepdim=True), products.amax(1, keepdim=True)
        scaled = (products - low) / (high - low).clamp_min(1e-12)
        grid = scaled.unflatten(1, (1, *found.grid))
        return F.interpolate(grid, size=found.size, mode="bilinear").flatten(1)


def loss(batch: Batch, factors: Factors) -> Loss:
    """CE(z_S(x'), y) + alpha |A_S(x') - A_O(x)| + beta |A_S(x) - A_O(x)|.

    A are maps of attention, (N, pixels), O the original model, and |.| the Euclidean norm over the
    pixels of an image.
    """
    target = attention(batch.teacher("original", "clean"), batch.labels)
    adv, clean = (attention(batch.student[view], batch.labels) for view in ("adv", "clean"))
    return mean_terms(
        cross_entropy=cross_entropy(batch.student["adv"].logits, batch.labels),
        refine=factors.refine * (adv - target).norm(dim=1),
        constrain=factors.constrain * (clean - target).norm(dim=1),
    )


METHOD = Method(
    name="tga-zsr",
    summary="TeCoA, its text-guided attention held near that of the original model",
    views=("clean", "adv"),
    loss=loss,
    targets=lambda _: (("original", "clean"),),
    guide=lambda _: CROSS_ENTROPY,
    patches=True,
    options=Factors,
)
