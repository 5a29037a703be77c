"""What a training method is to the loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol as Interface

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mmtard_bench.train.losses import cross_entropy, kl, squared_distance
from mmtard_bench.train.towers import Output, Role, View


class Options(BaseModel):
    """A method's own switches, set in a recipe's ``[options]``; most methods have none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Softened(Options):
    """Distillation at a temperature (Hinton et al., 2015, arXiv 1503.02531, section 2).

    It divides every logit before a softmax: teachers that are certain of their training images
    say more than the label again. Its square scales the loss, which keeps the gradients' size.
    """

    temperature: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Loss:
    """What a method computes on a batch.

    ``terms`` are the parts of the loss, scalars that are summed and minimised. ``weights`` are
    per-sample figures worth looking at, (N,) each, such as the weights of the teachers.
    """

    terms: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


class Batch(Interface):
    """What a method may ask for on a batch of N training images.

    ``student`` holds the outputs on the views that the method declares. ``teacher`` gives those of
    a frozen model. ``gather`` joins (N, ...) tensors of all processes to those of the global
    batch; only this process's rows carry gradients, and ``processes`` is how many there are.
    """

    @property
    def labels(self) -> Tensor: ...
    @property
    def student(self) -> Mapping[View, Output]: ...
    @property
    def processes(self) -> int: ...
    def teacher(self, role: Role, view: View, /) -> Output: ...
    def gather(self, rows: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Guide:
    """What the inner attack maximises: (student, guiding teacher on x, labels) -> (N,)."""

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
    """Maximise KL(softmax z_role(x) || softmax z_S(x')): label-free."""
    return Guide(role, _away_in_prediction)


@dataclass(frozen=True)
class Method:
    """A way to train a student. ``views`` are the images that the student learns from.

    ``targets`` and ``guide`` say, for given options, which outputs of frozen models the loss asks
    for and what the inner attack maximises (None: there is no attack). ``labels`` and ``classes``
    say whether labels and class names are needed.
    """

    name: str
    summary: str
    views: tuple[View, ...]
    loss: Callable[[Batch, Any], Loss]
    targets: Callable[[Any], tuple[tuple[Role, View], ...]] = lambda _: ()
    guide: Callable[[Any], Guide | None] = lambda _: None
    labels: bool = True
    classes: bool = True
    options: type[Options] = Options


def mean_terms(**terms: Tensor) -> Loss:
    """A loss whose terms are means over the batch of (N,) tensors."""
    return Loss({name: values.mean() for name, values in terms.items()})


def global_term(value: Tensor, processes: int) -> Tensor:
    """A scalar computed by every process on the gathered batch, with the gradient it must have.

    The processes' gradients are averaged, and each holds only its own rows' share: it is scaled
    by the number of processes, the value is not.
    """
    return value.detach() + processes * (value - value.detach())


def rows_of_mean_one(weights: Tensor, batch: Batch) -> Tensor:
    """Weights (N,) scaled to a mean of one over the global batch; no gradient."""
    weights = weights.detach()
    return weights / batch.gather(weights).mean().clamp_min(torch.finfo(weights.dtype).tiny)
