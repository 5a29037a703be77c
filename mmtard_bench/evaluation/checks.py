"""Is the model fit to be attacked, and can its robustness be believed?

Checks that end an evaluation raise ``ModelError``; the rest become flags of the record. They
follow Athalye et al. (2018), Carlini et al. (2019), and Croce et al. (2022), whose warnings for
randomised and adaptive defences AutoAttack prints; here they are data.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from scipy.special import bdtrc
from torch import Tensor

from mmtard_bench.attacks.base import Classifier, norm_of
from mmtard_bench.errors import ModelError
from mmtard_bench.evaluation.gradients import (
    answers_and_gradients,
    check_grid,
    check_large_radius,
    check_prediction,
    check_zero,
)
from mmtard_bench.records.black_box import HONEST, BlackBox
from mmtard_bench.records.schema import Flag, Sample
from mmtard_bench.tasks.watched import require_logits
from mmtard_bench.types import Norm, ThreatModel

_RANDOM = 1e-4  # of the range of the logits
_BATCH = 1e-3  # of the range of the logits; kernels for other batch sizes round differently
_SIZES = (2, 33, 128)  # of batches that are compared, beside the largest
_TURNED = 0.1  # one minus the cosine of gradients in two batches
_CHANCE_LEVEL = 0.05
_SCALES = (5.0, 1000.0)  # CLIP starts at 14.3 and ends at 100


ModelCode = Literal[
    "randomised-output",
    "batch-dependent-output",
    "optimises-at-inference",
    "softmax-output",
    "unusual-logit-scale",
    "zero-gradients",
    "gradient-does-not-predict",
    "robust-at-any-radius",
    "grid-dependent-output",
    "precision-dependent",
    "coarse-logits",
    "dominant-dimension",
    "equal-class-embeddings",
]
"""What the checks of a model may find, here, in ``gradients`` and in ``check_head``."""
SampleCode = Literal[
    "clean-accuracy-at-chance",
    "square-beats-gradients",
    "black-box-beats-gradients",
    "unconfirmed-adversarials",
]
"""What ``check_samples`` may find."""


def require_in_ball(found: Tensor, images: Tensor, threat: ThreatModel) -> None:
    """Raise ModelError unless adversarial images are finite and in the ball and the box."""
    if not torch.isfinite(found).all():
        raise ModelError(f"The attack {threat.attack} returned NaN or infinite pixels.")
    if float(found.min()) < 0 or float(found.max()) > 1:
        raise ModelError(f"The attack {threat.attack} left the box [0, 1].")
    norm, eps = threat.norm, float(threat.eps)
    if norm == "levenshtein":
        norm, eps = "linf", 0.0
    distance = float(norm_of(found - images, norm).max())
    if distance > _reach(eps):
        raise ModelError(
            f"The attack {threat.attack} left the {norm} ball: distance {distance:.6f}, "
            f"eps {eps:.6f}."
        )


def inside(found: Tensor, images: Tensor, *, norm: Norm, eps: float) -> Tensor:
    """Which images (N, 3, H, W) are in the box [0, 1] and the ball around theirs: (N,) bool."""
    boxed = ((found >= 0) & (found <= 1)).flatten(1).all(1)
    return boxed & (norm_of(found - images, norm) <= _reach(eps))


def _reach(eps: float) -> float:
    """Pixels near 1 are known to 6e-8; an L2 norm adds up many such errors."""
    return eps * (1 + 1e-5) + 1e-6


def inspect_model(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    scale: float,
    largest: int = 0,
) -> list[Flag]:
    """Probe a classifier with a few images (N, 3, H, W) before it is attacked.

    ``largest`` is the largest batch that an evaluation makes. Gradients are checked on the images
    and near them, where pixels have no 8-bit values, as in adversarial images.

    Raises ModelError for output that is NaN, of the wrong shape, or the same for every image.
    Returns what speaks against taking its robustness at face value.
    """
    with torch.no_grad():
        logits = model(images)
        require_logits(logits, rows=len(images), classes=classes)
        again = model(images)
    spread = float(logits.max() - logits.min()) or 1.0
    if bool((images != images[:1]).any()) and bool(
        (logits - logits[:1]).abs().max() <= 1e-6 * spread
    ):
        raise ModelError(
            f"The model gives the same logits for {len(images)} different images; it ignores its "
            "input, so its robustness means nothing. Check how it was loaded."
        )
    found: list[Flag | None] = [
        _check_random(logits, again, spread),
        _check_batch(model, images, logits, spread),
        *_check_gradient_passes(model, images, logits, spread, largest=largest),
        _check_inference(model, images),
        _check_softmax(logits),
        _check_scale(scale),
        check_grid(model, images, logits, spread),
    ]
    right = logits.argmax(1) == labels
    for points in (images, near(images)):
        if bool(right.any()):
            found.append(check_zero(model, points[right], labels[right]))
        found.append(check_prediction(model, points))
    found.append(check_large_radius(model, images))
    return list({flag.code: flag for flag in found if flag is not None}.values())


def near(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) with uniform noise of up to 2/255, in [0, 1]."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    return (images + (noise - 0.5) * (4 / 255)).clamp(0, 1)


def _check_random(first: Tensor, second: Tensor, spread: float) -> Flag | None:
    difference = float((first - second).abs().max()) / spread
    if difference <= _RANDOM:
        return None
    return Flag(
        code="randomised-output",
        detail=f"two passes over the same images differ by {difference:.1e} of the logits' range; "
        "only autoattack-rand is meant for such a model",
    )


def _check_batch(model: Classifier, images: Tensor, logits: Tensor, spread: float) -> Flag | None:
    with torch.no_grad():
        alone = torch.cat([model(images[i : i + 1]) for i in range(min(4, len(images)))])
    difference = float((alone - logits[: len(alone)]).abs().max()) / spread
    if difference <= _BATCH:
        return None
    return Flag(
        code="batch-dependent-output",
        detail="an image alone and in a batch get logits that differ by "
        f"{difference:.1e} of their range",
    )


def _check_gradient_passes(
    model: Classifier, images: Tensor, logits: Tensor, spread: float, *, largest: int
) -> Iterator[Flag]:
    """Whether logits and gradients stay the same in passes with gradients, and in large batches."""
    answers, expected = answers_and_gradients(model, images)
    difference = float((answers - logits).abs().max()) / spread
    if difference > _BATCH:
        yield Flag(
            code="randomised-output",
            detail="passes with and without gradients differ by "
            f"{difference:.1e} of the logits' range",
        )
    for size in sorted({*(size for size in _SIZES if size < largest), largest} - {0, 1}):
        rows = torch.arange(size, device=images.device).flip(0) % len(images)
        answers, found = answers_and_gradients(model, images[rows])
        difference = float((answers - logits[rows]).abs().max()) / spread
        turned = float((1 - F.cosine_similarity(found, expected[rows])).median())
        if difference > _BATCH or turned > _TURNED:
            yield Flag(
                code="batch-dependent-output",
                detail=f"in a batch of {size} logits differ by {difference:.1e} of their range, "
                f"and gradients by {turned:.1e} in cosine (median)",
            )


def _check_inference(model: Classifier, images: Tensor) -> Flag | None:
    # torch.autograd.grad and backward, however they are called, both go through this function.
    with (
        mock.patch.object(
            torch.autograd, "_make_grads", wraps=torch.autograd._make_grads
        ) as gradients,
        torch.no_grad(),
    ):
        model(images[:2])
    if not gradients.called:
        return None
    return Flag(
        code="optimises-at-inference",
        detail="the model computes gradients to answer; attacks that do not see through that are "
        "too weak",
    )


def _check_softmax(logits: Tensor) -> Flag | None:
    one = bool(((logits.sum(1) - 1).abs() < 1e-4).all())
    if not (one and bool((logits >= 0).all()) and bool((logits <= 1).all())):
        return None
    return Flag(
        code="softmax-output", detail="the logits are probabilities; losses on them saturate"
    )


def _check_scale(scale: float) -> Flag | None:
    if _SCALES[0] <= scale <= _SCALES[1]:
        return None
    return Flag(
        code="unusual-logit-scale",
        detail=f"the logit scale is {scale:.3g}; CLIP's is 100, and outside {_SCALES[0]:g} to "
        f"{_SCALES[1]:g} gradients of the cross-entropy vanish or lose their meaning",
    )


def check_samples(
    samples: Sequence[Sample], attack: str, black_box: BlackBox | None = None
) -> list[Flag]:
    """What the verdicts of a record under an attack, and its check, give reason to doubt."""
    doubts = []
    chance = check_chance(samples)
    if chance is not None:
        doubts.append(chance)
    # Square alone has no gradients to beat.
    square = check_square([sample.broken_by for sample in samples])
    if square is not None and not attack.startswith("square-"):
        doubts.append(square)
    if black_box is not None and black_box.beats_gradients:
        detail = (
            f"{black_box.attack}, which needs no gradients, broke {black_box.broken} of "
            f"{black_box.drawn} samples that the attack had left robust; at most {HONEST:.0%} are "
            "expected"
        )
        doubts.append(Flag(code="black-box-beats-gradients", detail=detail))
    unconfirmed = sum(sample.unconfirmed for sample in samples)
    if unconfirmed:
        detail = (
            f"{unconfirmed} adversarial images were not misclassified by a fresh pass; they count "
            "as broken. A few come from rounding, many from a randomised model"
        )
        doubts.append(Flag(code="unconfirmed-adversarials", detail=detail))
    return doubts


def check_chance(samples: Sequence[Sample]) -> Flag | None:
    """Clean accuracy must be above what the same predictions in another order would have.

    So much is right by chance if predictions do not depend on the images (Cohen, 1960), also where
    one class is always predicted and where classes are of different sizes. The test is the
    binomial one; samples too few for it are doubted only where fewer are right than by chance.
    """
    count = len(samples)
    labels = Counter(sample.label for sample in samples)
    predictions = Counter(sample.prediction for sample in samples)
    if len(labels) < 2:
        return None
    chance = sum(labels[name] * times for name, times in predictions.items()) / count**2
    right = sum(sample.clean_correct for sample in samples)
    p = float(bdtrc(right - 1, count, chance)) if right else 1.0
    testable = chance**count < _CHANCE_LEVEL
    if right > chance * count and (p <= _CHANCE_LEVEL or not testable):
        return None
    return Flag(
        code="clean-accuracy-at-chance",
        detail=f"the clean accuracy, {right} of {count}, is not above chance, {chance:.1%} "
        f"(binomial test at {_CHANCE_LEVEL:.0%}): check that the towers were trained together, and "
        "the preprocessing, the prompts and the order of the classes",
    )


def check_square(broken_by: list[str | None]) -> Flag | None:
    """Square, which needs no gradients, should break next to nothing that APGD and FAB left."""
    by_square = sum(name == "square" for name in broken_by)
    if by_square < 2 or by_square <= 0.01 * len(broken_by):
        return None
    return Flag(
        code="square-beats-gradients",
        detail=f"Square broke {by_square} of {len(broken_by)} samples that all "
        "gradient-based attacks had left standing",
    )
