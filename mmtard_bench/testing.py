"""A kit for the tests of plug-ins: toy models with known answers, and a check of an attack.

Nothing else in the package imports it.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmtard_bench.attacks.base import Engine, EngineName, Work, joined, norm_of
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.models.clip import Clip, Preprocess
from mmtard_bench.types import ClipModel, Eps, Norm, ThreatModel

TOKENS = 1741
"""The least prime with which no two prompts of digits/digit and digits/unseen share a token."""


class LinearClassifier(nn.Module):
    """Logits = W x + b on flattened images: the nearest adversarial image is known exactly.

    Args:
        classes: The number of classes.
        shape: The shape of an image, (3, H, W).
        seed: The seed of the weights.
    """

    def __init__(
        self, classes: int, shape: tuple[int, int, int] = (3, 6, 6), seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = shape[0] * shape[1] * shape[2]
        self.weight = nn.Parameter(torch.randn(classes, size, generator=generator))
        self.bias = nn.Parameter(-(self.weight.detach() * 0.5).sum(1))
        self.requires_grad_(False)
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        return images.flatten(1) @ self.weight.T + self.bias

    def distance(self, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
        """The distance to the nearest misclassified point, for correct images: (N,).

        It is the margin over the dual norm of the difference of the weights, the least over the
        other classes. The box [0, 1] is not taken into account.
        """
        logits = self.forward(images)
        gaps = logits.gather(1, labels[:, None]) - logits
        normals = self.weight[labels][:, None, :] - self.weight[None]
        dual = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
        return (gaps / dual).masked_fill(torch.eye(len(self.weight))[labels].bool(), 1e9).amin(1)

    def samples(self, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) away from the faces of the box, with the model's own labels (N,)."""
        generator = torch.Generator().manual_seed(seed)
        images = 0.3 + 0.4 * torch.rand((count, *self.shape), generator=generator)
        return images, self.forward(images).argmax(1)


class ToyModule(nn.Module):
    """The smallest CLIP: a linear image tower, and an embedding for each text."""

    def __init__(self, width: int = 16, size: int = 32, scale: float = 20.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = nn.Parameter(torch.randn(3 * size * size, width, generator=generator) / size)
        self.text = nn.Parameter(torch.randn(TOKENS, width, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> embeddings (N, width)."""
        return images.flatten(1) @ self.image

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (N,) -> embeddings (N, width)."""
        return self.text[tokens]


def tokenize(texts: Sequence[str]) -> Tensor:
    """One token for each text: (N,)."""
    return torch.tensor([zlib.crc32(text.encode()) % TOKENS for text in texts])


def toy_clip(module: ClipModel | None = None, name: str = "toy", size: int = 32) -> Clip:
    """A module (default: a ``ToyModule``) as a ``Clip`` for images of size x size pixels.

    Examples:
        >>> mb.evaluate(toy_clip(), task="digits/digit", threat="pgd-2", eps="1/255", n=4).status
        'ok'
    """
    preprocess = Preprocess((size, size), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Clip(module or ToyModule(size=size), tokenize, preprocess, name)


@dataclass(frozen=True)
class Checked:
    """How strong an attack is on linear models, as ``check_attack`` found.

    Attributes:
        breakable: How many samples can be broken within the radius.
        broken: How many of them the attack broke.
    """

    breakable: int
    broken: int


def check_attack(
    name: str,
    *,
    norm: Norm = "linf",
    engine: EngineName = "fast",
    classes: int = 3,
    samples: int = 32,
    seed: int = 0,
) -> Checked:
    """Check what the runner relies on, for a registered attack on a linear model.

    The radius is the median distance to the boundary, so that half of the samples can be broken.

    Args:
        name: The attack, such as "pgd-20".
        norm: The norm of the ball.
        engine: The engine that runs the attack.
        classes: The number of classes.
        samples: The number of samples.
        seed: The seed of the attack.

    Returns:
        How many samples could be broken, and how many were.

    Raises:
        AssertionError: If there is no result for a sample, or several; if an adversarial image
            leaves the ball or the box; if a sample is called broken whose image the model
            classifies correctly, or whose distance to the boundary is above the radius; or if other
            samples in the batch change the verdict of a sample, for an attack without a block.
        InputError: If the attack is unknown or does not support the norm.

    Examples:
        >>> check_attack("apgd-pair")
        Checked(breakable=16, broken=16)
    """
    model = LinearClassifier(classes)
    images, labels = model.samples(samples)
    distance = model.distance(images, labels, norm)
    eps = Eps(round(float(distance.median()) * 100_000), 100_000)
    attack = build_attack(ThreatModel(name, norm, eps), n_classes=classes, engine=Engine(engine))

    def work(rows: slice) -> Work:
        ids = [f"sample-{i}" for i in range(samples)][rows]
        return Work(
            model=model,
            images=images[rows].clone(),
            labels=labels[rows],
            ids=ids,
            seed=seed,
            batch_size=16,
        )

    parts = list(attack.parts(work(slice(None))))
    places = sorted(place for where, _ in parts for place in where)
    assert places == list(range(samples)), f"{name}: not one result for each sample: {places}"
    found = joined(parts)
    radius = float(eps)
    assert float(found.adversarial.min()) >= 0, f"{name}: pixels below 0"
    assert float(found.adversarial.max()) <= 1, f"{name}: pixels above 1"
    reached = float(norm_of(found.adversarial - images, norm).max())
    assert reached <= radius * (1 + 1e-5) + 1e-6, f"{name}: distance {reached}, radius {radius}"
    broken = torch.tensor([by is not None for by in found.broken_by])
    wrong = model(found.adversarial).argmax(1) != labels
    assert bool(wrong[broken].all()), f"{name}: calls a sample broken that is classified correctly"
    beyond = distance > radius * (1 + 1e-4)
    assert not bool((broken & beyond).any()), f"{name}: breaks what no point in the ball breaks"
    if attack.block is None:
        half = attack.whole(work(slice(0, samples // 2)))
        whole = found.broken_by[: samples // 2]
        assert half.broken_by == whole, f"{name}: verdicts depend on the other samples"
    breakable = distance < radius * (1 - 1e-4)
    return Checked(int(breakable.sum()), int((broken & breakable).sum()))
