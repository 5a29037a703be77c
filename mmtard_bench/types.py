"""Facts that never change while a program runs: radii, threat models, tasks, suites, protocols."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol as Interface

from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
)

from mmtard_bench.errors import InputError
from mmtard_bench.schema import Text, Whole, checked

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["linf", "l2"]
"""Norms of pixels."""
ThreatNorm = Literal["linf", "l2", "levenshtein"]
"""What a threat model is measured in: pixels, or characters of the class name."""
Metric = Literal["zero-shot classification", "retrieval"]
Surface = Literal["native", "model"]


def _in_order(value: object) -> object:
    """A list as the tuple that it may be given for. A set has no order, a string no elements."""
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError('a tuple of strings; a single one is written ("...",)')
    return value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_in_order)]
Several = Annotated[Whole, Field(ge=1)]


@dataclass(frozen=True)
class Eps:
    """A radius as the exact fraction that was written, for pixels in [0, 1].

    A count of edits k is written k/1.
    """

    numerator: int
    denominator: int

    @classmethod
    def parse(cls, text: object, *, norm: ThreatNorm = "linf") -> "Eps":
        """Read "8/255", or take an ``Eps``. A decimal, or anything else, raises InputError.

        So does zero, but for "levenshtein": no edits at all is a budget like another. Pixels are in
        [0, 1], so that "linf" has no radius above 1.
        """
        if isinstance(text, Eps):
            text = str(text)
        match = None
        if isinstance(text, str):
            match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        zero = match is not None and not int(match[1])
        if match is None or not int(match[2]) or (zero and norm != "levenshtein"):
            raise InputError(
                f"eps = {text!r} is not an exact positive fraction; write a string such as "
                '"8/255" (pixels are in [0, 1]), not a decimal.'
            )
        eps = cls(int(match[1]), int(match[2]))
        if norm == "linf" and eps.numerator > eps.denominator:
            raise InputError(
                f"eps = {eps} is beyond the range of pixels, which are in [0, 1]; expected an "
                f"L-inf radius of at most 1/1. For {eps.numerator} of 255 levels write "
                f'"{eps.numerator}/255".'
            )
        return eps

    def __float__(self) -> float:
        return self.numerator / self.denominator

    def __str__(self) -> str:
        return f"{self.numerator}/{self.denominator}"


def _radius(value: object) -> Eps:
    # Zero is allowed here, and refused once the norm is there.
    return Eps.parse(value, norm="levenshtein")


@checked
@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do: an attack with its budget, a ball, and the pixels it touches.

    ``surface`` is "native" (the data set's own pixels, resized inside the model) or "model"
    (pixels at the model's input size). With the norm "levenshtein" the pixels stay, and ``eps`` is
    k/1 for k edits of the class name; it may be given as text. Raises InputError for fields of
    another kind, and for an L-inf radius above 1.
    """

    attack: Text
    norm: ThreatNorm
    eps: Annotated[InstanceOf[Eps], BeforeValidator(_radius)]
    surface: Surface = "native"

    def __post_init__(self) -> None:
        Eps.parse(self.eps, norm=self.norm)

    def require_reach(self, height: int, width: int) -> None:
        """Raise InputError for an L2 radius above the diameter of the box of such RGB images."""
        reach = math.sqrt(3 * height * width)
        if self.norm == "l2" and float(self.eps) > reach:
            raise InputError(
                f"eps = {self.eps} is an L2 radius above {reach:.1f}, the largest distance between "
                f"two images of {width} x {height} pixels in [0, 1]. Published L2 radii are about "
                '0.5 to 3, written "128/255" or "3/1".'
            )

    @property
    def pixel_norm(self) -> Norm:
        """The norm, for an attack on pixels. Raises InputError for the norm of another attack."""
        if self.norm == "levenshtein":
            raise InputError(
                f"The attack {self.attack} changes pixels, but the norm 'levenshtein' counts edits "
                "of a text; expected linf or l2."
            )
        return self.norm

    @property
    def name(self) -> str:
        """For example "pgd-20 linf 8/255"; "model" is added for that surface."""
        suffix = " model" if self.surface == "model" else ""
        return f"{self.attack} {self.norm} {self.eps}{suffix}"


@checked
@dataclass(frozen=True)
class Task:
    """Zero-shot classification of one data set with one set of prompts, or retrieval.

    ``data`` is a registered data set or a spec: ``parquet:FILES``, ``imagefolder:DIR``,
    ``saved:DIR`` (by ``save_to_disk`` of the package datasets),
    ``hub:ORG/NAME[@REVISION]``, ``wds:ORG/NAME[@REVISION]``, ``wds:DIR``; a path may begin with
    the name of an environment variable, ``$NAME``. ``classes`` overrides the names that the data
    set carries (one name a label, in label order). An empty ``label_column`` says that the data
    has no labels: it can train a method that needs none, but not score a model. Each template has
    one ``{}`` for the class name; without templates, the data set's own are used. With
    ``convert_rgb`` images of 8 bits a channel that are not RGB are converted as Pillow does;
    without, they are refused. More bits a channel are always refused.

    ``n_classes`` is how many classes there must be. ``samples`` is how many samples the split
    has: the ids of a ``wds:`` data set then follow without its shards, of which only those that
    are needed are downloaded; ``shard_samples``, how many a full shard has, helps to guess which.
    ``samples_file`` lists the ids that may be drawn, one a line. ``surface`` is the one that the
    protocol of the task attacks.

    For the metric "retrieval" the data are images with captions: ``label_column`` names the column
    of captions (a list of strings, or one string with a caption a line), and ``templates`` is what
    a caption is put into, ("{}",) for the caption as it is.

    Lists become tuples. Raises InputError for fields of another kind, for empty names, and for
    templates without exactly one place for the name.
    """

    name: Text
    data: Text
    templates: Texts
    classes: Texts = ()
    split: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    convert_rgb: bool = False
    metric: Metric = "zero-shot classification"
    description: str = ""
    n_classes: Annotated[Whole, Field(ge=2)] | None = None
    samples: Several | None = None
    shard_samples: Several | None = None
    samples_file: Text | None = None
    surface: Surface = "native"
    licence: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        require_templates(self.templates, self.name)
        if self.metric == "retrieval" and not self.templates:
            raise InputError(
                f"The task '{self.name}' is retrieval and has no template; expected one such as "
                '("{}",), which leaves captions as they are.'
            )


def require_templates(templates: Sequence[str], task: str) -> None:
    """Raise InputError unless every template has exactly one place for the name, ``{}``."""
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            other = re.search(r"\{[^{}]+\}", template)
            hint = f" Write {{}} in place of {other[0]}." if other else ""
            raise InputError(
                f"The template '{template}' of the task '{task}' needs exactly one {{}} for the "
                f"class name, and no other braces.{hint}"
            )


@dataclass(frozen=True)
class Protocol:
    """A named, versioned set of threat models and sampling rules, and where it comes from."""

    name: str
    description: str
    threats: tuple[ThreatModel, ...]
    samples: str
    source: str


@dataclass(frozen=True)
class Suite:
    """Tasks with their threat models + sample count + seed. Its meaning never changes.

    ``plan`` gives the threat models of each task, in order. ``n`` is None for all samples.
    Reference attacks work on blocks of ``block`` consecutive samples. With ``skip_damaged``,
    samples whose images are damaged are left out, and records name them. With ``curve``, ``plan``
    has the largest radii first, and a sample that is robust at one counts as robust at the smaller
    ones. ``digest`` hashes what the suite means, not how its file is written.
    """

    name: str
    description: str
    protocol: str | None
    plan: tuple[tuple[Task, tuple[ThreatModel, ...]], ...]
    n: int | None
    seed: int
    block: int
    digest: str
    skip_damaged: bool = False
    curve: bool = False

    @property
    def threats(self) -> tuple[ThreatModel, ...]:
        """Every threat model that some task has."""
        return tuple(dict.fromkeys(threat for _, threats in self.plan for threat in threats))

    @property
    def records(self) -> int:
        """How many records a run of the suite has."""
        return sum(len(threats) for _, threats in self.plan)


class ClipModel(Interface):
    """What any CLIP-like object must offer to be scored; open_clip models do, wrapped in ``Clip``.

    ``encode_image`` takes images at the model's input size, normalised as ``preprocess`` says,
    and ``encode_text`` the tokenizer's output; both return (N, D) features, of one D.
    ``logit_scale`` is the logarithm of the scale, as in CLIP: logits are exp(scale) * cosine.
    """

    logit_scale: Any

    def encode_image(self, images: "Tensor") -> "Tensor": ...
    def encode_text(self, tokens: "Tensor") -> "Tensor": ...


class Tokenizer(Interface):
    """Turns texts into whatever the model's ``encode_text`` takes."""

    def __call__(self, texts: "Sequence[str]", /) -> "Tensor": ...


FAST_CODE = "mmtard_bench fast"
"""How the "code" of a threat model's parameters begins where the fast engine ran the attack."""
