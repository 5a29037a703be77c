"""Image towers with their class embeddings: the trainable student and the frozen teachers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip
from mmtard_bench.tasks.classifier import class_embeddings

View = Literal["clean", "adv"]
Role = Literal["clean", "robust", "original"]
"""The roles of teachers. "original" is the student with its starting weights."""


@dataclass(frozen=True)
class Head:
    """The frozen text side of a model for one set of prompts: unit rows (C, D) and logit scale."""

    embeddings: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Output:
    """A model's output for N images: the unnormalised embedding (N, D), and the head."""

    embedding: Tensor
    head: Head

    @cached_property
    def cosine(self) -> Tensor:
        """Cosine similarity with every class, (N, C), in float32 even under autocast."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            return F.normalize(self.embedding.float(), dim=-1) @ self.head.embeddings.T

    @cached_property
    def logits(self) -> Tensor:
        """The logits, scale * cosine, (N, C), float32."""
        return self.head.scale * self.cosine


class Tower(nn.Module):
    """Maps images (N, 3, H, W) in [0, 1] to embeddings (N, D), with the model's preprocessing."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        visual = getattr(clip.module, "visual", None)
        if not isinstance(visual, nn.Module):
            raise InputError(
                f"The model '{clip.name}' has no image tower 'visual', so it can be neither "
                "student nor teacher; expected a model in open_clip's layout."
            )
        self.visual = visual
        self._preprocess = clip.preprocess

    def forward(self, images: Tensor) -> Tensor:
        inputs = self._preprocess.normalise(self._preprocess.resize(images))
        embedding = self.visual(inputs)
        if not isinstance(embedding, Tensor):
            raise InputError(
                f"The image tower {type(self.visual).__name__} returns a "
                f"{type(embedding).__name__}; only towers that return one embedding can be trained."
            )
        return embedding


def require_apart(student: Clip, teacher: Clip, who: str) -> None:
    """Raise InputError if student and teacher share memory: training would change the teacher.

    Shared parameters, buffers and views of them count. ``who`` names the teacher in the message.
    """
    ours, theirs = (_storages(clip) for clip in (student, teacher))
    shared = sorted(ours[place] for place in ours.keys() & theirs.keys())
    if shared:
        raise InputError(
            f"The {who} '{teacher.name}' shares {len(shared)} tensors with the student, "
            f"'{shared[-1]}' for example, so training would change the teacher. Expected a "
            "separate model: a function that makes a model must return a new one on each call."
        )


def _storages(clip: Clip) -> dict[int, str]:
    """The addresses of a model's parameters and buffers, each with the name of one of them."""
    module = clip.module if isinstance(clip.module, nn.Module) else clip.module.visual  # type: ignore[attr-defined]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    places = {t.untyped_storage().data_ptr(): name for name, t in tensors}
    return {
        place: name for place, name in places.items() if place
    }  # 0: an empty tensor, or one without memory


def head_of(
    clip: Clip, classes: tuple[str, ...], templates: tuple[str, ...], device: torch.device
) -> Head:
    """The head of a model for the prompts of a task; one pass of the frozen text tower is enough.

    Without classes the head is empty: methods that compare embeddings do not need it.
    """
    if not classes:
        return Head(torch.zeros(0, 1, device=device), clip.scale().to(device))
    return Head(class_embeddings(clip, classes, templates, device), clip.scale().to(device))


class Teacher:
    """A frozen model. ``known`` holds its embeddings of all clean training images, or None."""

    def __init__(self, tower: Tower, head: Head) -> None:
        self.tower = tower.eval().requires_grad_(False)
        self.head = head
        self.known: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Output:
        return Output(self.tower(images).float(), self.head)

    def recall(self, indices: Tensor) -> Output | None:
        """The known outputs on the clean training images ``indices``; None without ``known``."""
        if self.known is None:
            return None
        rows = self.known[indices]
        return Output(rows.to(self.head.embeddings.device), self.head)


Teachers = Mapping[Role, Teacher]
