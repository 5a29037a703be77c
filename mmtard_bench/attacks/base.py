"""The interface of attacks, and the functions that all attacks share."""

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
    """A zero-shot classifier with its text side: the model that attacks on class names get.

    ``names`` are the class names and ``head`` (C, D) their rows; logits are ``features(images) @
    head.T``. ``embed_names`` returns the rows (M, D) of other names, each from ``prompts_a_name``
    prompts. ``keep`` is for names that are needed again for every image of a class.
    """

    names: tuple[str, ...]
    prompts_a_name: int
    head: Tensor

    def __call__(self, images: Tensor, /) -> Tensor: ...
    def features(self, images: Tensor) -> Tensor: ...
    def embed_names(self, names: Sequence[str], *, keep: bool = False) -> Tensor: ...


@dataclass
class AttackResult:
    """The result of an attack on a batch of N samples.

    ``adversarial`` is (N, 3, H, W). ``broken_by[i]`` is the name of the attack that claims to have
    broken sample i, or None; ``evaluate`` checks every claim by a new pass. ``forward`` and
    ``backward`` are the passes that each sample cost. ``names`` has the edited class name of each
    sample, or None where the name is unchanged; it is empty for attacks on pixels.
    ``model_seconds`` is the time inside the model, if the attack measures it.
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
"""The positions of some samples of a batch, and the result of the attack for them."""


def joined(parts: Sequence[Part]) -> AttackResult:
    """Join parts of a batch, each with the positions of its samples, into one result."""
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
    """The progress of an attack.

    ``settled`` samples need no more passes; ``broken`` of them are broken; they cost ``spent``
    forward and backward passes. ``stage`` is the running part of the attack. It has ``rows``
    searches at once, of which the oldest is at ``step``.
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

    ``images`` are (N, 3, H, W) in [0, 1], ``labels`` (N,). ``ids`` seed the random numbers of each
    sample. At most ``batch_size`` rows should go through the model at once; the batch size may
    change costs, but no verdict. An attack may pass ``watch`` a function that returns its progress;
    it is called from time to time during passes. A second call of ``watch`` replaces the function.
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

    ``parameters`` are part of a record's identity. ``block``: None if samples are independent of
    each other. Reference attacks draw random numbers per batch and therefore run on fixed blocks of
    ``block`` consecutive samples of the manifest. ``edits``: the most characters of a class name
    that the attack changes; None for an attack on pixels. ``refills``: whether the attack replaces
    settled samples by new ones, so that batches stay full (attacks of the fast engine). ``passes``:
    the most forward and backward passes per sample, None if unknown. ``version`` increases with
    every change of the code that changes a verdict. Version 1 is not written into records, so that
    older records keep their identity.
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
        """The parameters that are part of a record's identity."""
        return {**self.parameters, **({"version": self.version} if self.version > 1 else {})}

    def parts(self, work: Work) -> Iterator[Part]:
        """Run the attack; yield results as soon as they exist, never one without samples."""
        if not work.ids:
            return
        found = self.run(work)
        if isinstance(found, AttackResult):
            yield range(len(work.ids)), found
        else:
            yield from (part for part in found if len(part[0]))

    def whole(self, work: Work) -> AttackResult:
        """Run the attack and return one result for all samples, of which there is at least one."""
        return joined(list(self.parts(work)))


@checked
@dataclass(frozen=True)
class Engine:
    """The code that runs attacks: "fast" (ours, where it exists) or "reference" (the libraries).

    ``precision`` of the fast attacks' passes: "float32", or "bfloat16" under autocast, with a
    float32 pass that confirms every adversarial image.
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
    """Perturbations (N, 3, H, W), uniform in the ball; the key of a sample seeds its numbers."""
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
    """A function that projects points to the ball around their centres, then to the box [0, 1].

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
    """The logit of the true class minus the highest other one, (N,): negative if misclassified."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return true - others.amax(1)
