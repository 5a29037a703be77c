"""The interface of training methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol as Interface

import torch
from pydantic import Field
from torch import Tensor

from mmtard_bench.schema import Strict
from mmtard_bench.train.losses import cross_entropy, kl, squared_distance
from mmtard_bench.train.towers import Output, Role, View


class Options(Strict):
    """The options of a method, from the ``[options]`` of a recipe. Most methods have none."""


class Softened(Options):
    """Distillation at a temperature (Hinton et al., 2015, arXiv 1503.02531, section 2).

    The temperature divides every logit before a softmax, so that a teacher that is certain of its
    training images passes on more than the label. Its square multiplies the loss, which keeps the
    size of the gradients.
    """

    temperature: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Loss:
    """The result of a method on a batch.

    ``terms`` are the scalar terms of the loss; their sum is minimised. ``weights`` are figures per
    sample, (N,) each, such as the weights of the teachers. They are reported, not minimised.
    ``memory`` holds scalars that the method needs at the next step, the same on every process.
    """

    terms: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class Batch(Interface):
    """A batch of N training images, as a method receives it.

    ``student`` has the student's outputs on the views that the method declares. ``teacher`` returns
    the outputs of a frozen model. ``gather`` concatenates the tensors (N, ...) of all processes to
    those of the global batch; only the rows of this process carry gradients. ``processes`` is the
    number of processes. ``memory`` is that of the previous step's loss, empty at the first step.
    """

    @property
    def labels(self) -> Tensor: ...
    @property
    def student(self) -> Mapping[View, Output]: ...
    @property
    def processes(self) -> int: ...
    @property
    def memory(self) -> Mapping[str, float]: ...
    def teacher(self, role: Role, view: View, /) -> Output: ...
    def gather(self, rows: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Guide:
    """The objective of the inner attack: (student, teacher on x, labels) -> values (N,)."""

    role: Role | None
    objective: Callable[[Output, Output | None, Tensor], Tensor]


def _towards_other_classes(student: Output, _: Output | None, labels: Tensor) -> Tensor:
    return cross_entropy(student.logits, labels)


def _away_in_prediction(student: Output, teacher: Output | None, _: Tensor) -> Tensor:
    assert teacher is not None
    return kl(teacher.logits, student.logits)


def _away_in_embedding(student: Output, teacher: Output | None, _: Tensor) -> Tensor:
    assert teacher is not None
    return squared_distance(student.embedding, teacher.embedding)


CROSS_ENTROPY = Guide(None, _towards_other_classes)
AWAY_FROM_ORIGINAL = Guide("original", _away_in_embedding)


def away_from(role: Role) -> Guide:
    """Maximise KL(softmax z_role(x) || softmax z_S(x')). Needs no labels."""
    return Guide(role, _away_in_prediction)


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: The name in recipes.
        summary: One line for ``mmtard-bench list methods``.
        views: The images that the student learns from.
        loss: The loss of a batch, for given options.
        targets: The teacher outputs that the loss needs, for given options.
        guide: The objective of the inner attack, for given options; None means no attack.
        labels: Whether the method needs labels.
        classes: Whether the method needs class names.
        patches: Whether the loss needs the embeddings of patches (``Output.patches``).
        options: The model of the method's options in recipes.
    """

    name: str
    summary: str
    views: tuple[View, ...]
    loss: Callable[[Batch, Any], Loss]
    targets: Callable[[Any], tuple[tuple[Role, View], ...]] = lambda _: ()
    guide: Callable[[Any], Guide | None] = lambda _: None
    labels: bool = True
    classes: bool = True
    patches: bool = False
    options: type[Options] = Options

    def outputs(self, options: Options) -> tuple[tuple[Role, View], ...]:
        """The teacher outputs that a step needs: those of the loss, and the guide's."""
        guide = self.guide(options)
        role = guide.role if guide is not None else None
        guides: tuple[tuple[Role, View], ...] = () if role is None else ((role, "clean"),)
        return tuple(dict.fromkeys((*self.targets(options), *guides)))


def mean_terms(**terms: Tensor) -> Loss:
    """A loss whose terms are the batch means of tensors (N,)."""
    return Loss({name: values.mean() for name, values in terms.items()})


def global_term(value: Tensor, processes: int) -> Tensor:
    """A scalar that every process computes on the gathered batch, with the correct gradient.

    Each process has the gradient of its own rows only, and gradients are averaged over processes.
    Therefore the gradient is multiplied by the number of processes; the value is unchanged.
    """
    return value.detach() + processes * (value - value.detach())


def rows_of_mean_one(weights: Tensor, batch: Batch) -> Tensor:
    """Weights (N,) scaled to a mean of one over the global batch, without gradient."""
    weights = weights.detach()
    return weights / batch.gather(weights).mean().clamp_min(torch.finfo(weights.dtype).tiny)
