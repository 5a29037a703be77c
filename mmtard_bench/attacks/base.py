"""What an attack is to the rest of the package, and the pieces that all attacks share."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol as Interface, TypeVar

import torch
from torch import Tensor, nn

from mmtard_bench.schema import checked
from mmtard_bench.types import Norm

T = TypeVar("T")

EngineName = Literal["fast", "reference"]
Precision = Literal["float32", "bfloat16"]

Classifier = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [0, 1] -> logits (N, C)."""


class PromptedClassifier(Interface):
    """A classifier of images with a text side: the model that attacks on class names get.

    ``names`` are the classes', ``head`` (C, D) their rows; logits are ``features(images) @
    head.T``. ``embed_names`` gives the rows (M, D) of any other names, each from
    ``prompts_a_name`` prompts; those to ``keep`` are met again with every image of a class.
    """

    names: tuple[str, ...]
    prompts_a_name: int
    head: Tensor

    def __call__(self, images: Tensor, /) -> Tensor: ...
    def features(self, images: Tensor) -> Tensor: ...
    def embed_names(self, names: Sequence[str], *, keep: bool = False) -> Tensor: ...


@dataclass
class AttackResult:
    """What an attack found on a batch of N samples.

    ``adversarial`` is (N, 3, H, W). ``broken_by[i]`` names the attack that claims to have broken
    sample i, or is None; a claim counts only once ``evaluate`` has confirmed it. ``forward`` and
    ``backward`` are the passes that each sample cost. ``names`` has what an attack on the text made
    of the name of each sample's class, None where it left it; it is empty for other attacks.
    ``model_seconds`` is the time inside the model, where the attack measures it.
    """

    adversarial: Tensor
    broken_by: list[str | None]
    forward: list[int]
    backward: list[int]
    notes: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    model_seconds: float = 0.0

    def of(self, places: Sequence[int]) -> "AttackResult":
        """What was found on some of the samples; its seconds stay with the whole."""
        return AttackResult(
            adversarial=self.adversarial[places],
            broken_by=[self.broken_by[place] for place in places],
            forward=[self.forward[place] for place in places],
            backward=[self.backward[place] for place in places],
            notes=list(self.notes),
        )


Part = tuple[Sequence[int], AttackResult]
"""The places of some samples of a batch, and what was found on them."""


def joined(parts: Sequence[Part]) -> AttackResult:
    """One result for a batch, from parts of it: the places of their samples, what was found."""
    places = [place for where, _ in parts for place in where]
    order = sorted(range(len(places)), key=places.__getitem__)

    def of_samples(lists: Iterable[list[T]]) -> list[T]:
        every = [value for values in lists for value in values]
        return [every[i] for i in order] if every else []

    results = [result for _, result in parts]
    return AttackResult(
        adversarial=torch.cat([result.adversarial for result in results])[order],
        broken_by=of_samples(result.broken_by for result in results),
        forward=of_samples(result.forward for result in results),
        backward=of_samples(result.backward for result in results),
        notes=[note for result in results for note in result.notes],
        names=of_samples(result.names for result in results),
        model_seconds=sum(result.model_seconds for result in results),
    )


@dataclass(frozen=True)
class Pulse:
    """How far an attack is with the samples of its work.

    ``settled`` samples need no more passes, ``broken`` of them are broken, and ``spent`` counts the
    forward and backward passes that they cost. ``stage`` is the part of the attack under way, with
    ``rows`` searches at once, of which the oldest is at ``step``.
    """

    settled: int = 0
    broken: int = 0
    spent: int = 0
    stage: str = ""
    rows: int = 0
    step: int = 0


Gauge = Callable[[], Pulse]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Samples that ``model`` classifies correctly, to be attacked.

    ``images`` are (N, 3, H, W) in [0, 1], ``labels`` (N,); ``ids`` name the samples for per-sample
    randomness. At most ``batch_size`` rows should go through the model at once, which may change
    costs but no verdict. An attack gives ``watch`` a function that says how far the attack is; it
    is called now and then, whenever the model is. Another call of ``watch`` replaces the function.
    """

    model: Classifier
    images: Tensor
    labels: Tensor
    ids: Sequence[str]
    seed: int
    batch_size: int
    watch: Callable[[Gauge], None] = lambda _: None


Run = Callable[[Work], AttackResult | Iterator[Part]]
"""Returns one result for all samples, or yields parts as soon as their samples are settled."""


@checked
@dataclass(frozen=True)
class Attack:
    """An attack with everything that changes its output fixed.

    ``parameters`` enter the identity of a record. ``block`` is None for attacks whose samples are
    independent of each other; reference attacks draw randomness per batch, so they run on fixed
    blocks of that many consecutive samples of the manifest. ``edits`` is the most characters of a
    class name that it changes, None for an attack that leaves the text alone and needs none. An
    attack that ``refills`` keeps its batches full if it gets many samples at once; it is one of the
    fast engine. ``passes`` is the most forward and backward passes that a sample costs, None if
    that is not known. ``version`` rises with a change of the code that changes a verdict; version 1
    is not written, so that older records keep their identity.
    """

    name: str
    parameters: Mapping[str, str | int | float]
    run: Run
    block: int | None = None
    edits: int | None = None
    refills: bool = False
    passes: int | None = None
    version: int = 1

    @property
    def described(self) -> dict[str, str | int | float]:
        """What of the attack enters the identity of records."""
        return {**self.parameters, **({"version": self.version} if self.version > 1 else {})}

    def parts(self, work: Work) -> Iterator[Part]:
        """What the attack finds, as soon as it is there; never a part without samples."""
        if not work.ids:
            return
        found = self.run(work)
        if isinstance(found, AttackResult):
            yield range(len(work.ids)), found
        else:
            yield from (part for part in found if len(part[0]))

    def whole(self, work: Work) -> AttackResult:
        """What the attack finds on all samples, of which there is one at least."""
        return joined(list(self.parts(work)))


@checked
@dataclass(frozen=True)
class Engine:
    """What runs the attacks. "fast" is ours, where it has the attack; "reference" the library's.

    ``precision`` is that of the fast attacks' passes: bfloat16 under autocast, where float32 then
    confirms whatever was found, or float32.
    """

    name: EngineName = "fast"
    precision: Precision = "float32"


class CountPasses(nn.Module):
    """Count the rows that pass forward and backward through a classifier."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.forward_rows = 0
        self.backward_rows = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forward_rows += len(images)
        logits = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return logits

    def _count_backward(self, grad: Tensor) -> None:
        self.backward_rows += len(grad)


def sample_generator(*key: object) -> torch.Generator:
    """A CPU random generator for one sample, from (seed, sample id, attack, restart)."""
    digest = hashlib.sha256("|".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def random_start(
    images: Tensor, *, norm: Norm, eps: float, keys: Sequence[tuple[object, ...]]
) -> Tensor:
    """Perturbations (N, 3, H, W), uniform in the ball around each image, from a key a sample."""
    if not keys:
        return torch.zeros_like(images)
    shape = images.shape[1:]
    rows = []
    for key in keys:
        generator = sample_generator(*key)
        if norm == "linf":
            rows.append(torch.rand(shape, generator=generator) * 2 - 1)
        else:
            direction = torch.randn(shape, generator=generator)
            radius = torch.rand((), generator=generator) ** (1 / direction.numel())
            rows.append(direction * (radius / direction.norm()))
    return (torch.stack(rows) * eps).to(images.device)


def norm_of(perturbation: Tensor, norm: Norm) -> Tensor:
    """The norm of each row of (N, ...): (N,)."""
    flat = perturbation.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def projector(centre: Tensor, *, norm: Norm, eps: float) -> Callable[[Tensor], Tensor]:
    """What brings each point back into the ball around its centre, then into the box [0, 1].

    Centres lie in the box, so clipping to it never leaves the ball.
    """
    if norm == "linf":
        lower, upper = (centre - eps).clamp_min(0), (centre + eps).clamp_max(1)
        return lambda points: points.clamp(lower, upper)

    def project(points: Tensor) -> Tensor:
        offset = points - centre
        length = norm_of(offset, norm).clamp_min(1e-12).view(-1, *[1] * (offset.ndim - 1))
        return (centre + offset * (eps / length).clamp_max(1.0)).clamp(0, 1)

    return project


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The true class's logit minus the best other one, (N,): negative where misclassified."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return true - others.amax(1)
