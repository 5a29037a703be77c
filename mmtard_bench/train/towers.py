"""Image towers with their class embeddings: the trainable student and the frozen teachers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
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
class Patches:
    """The unnormalised embeddings of an image's patches in the space of the texts, (N, P, D).

    ``grid`` is the number of rows and columns, P = rows * columns; ``size`` is the height and the
    width of the model's input in pixels.
    """

    embeddings: Tensor
    grid: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Output:
    """A model's output for N images: the unnormalised embedding (N, D), and the head.

    ``patches`` is None unless the method needs it.
    """

    embedding: Tensor
    head: Head
    patches: Patches | None = None

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
    """Maps images (N, 3, H, W) in [0, 1] to embeddings (N, D), with the model's preprocessing.

    With ``patches=True`` it returns the embeddings and a ``Patches``.
    """

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

    def forward(self, images: Tensor, *, patches: bool = False) -> Tensor | tuple[Tensor, Patches]:
        inputs = self._preprocess.normalise(self._preprocess.resize(images))
        if patches:
            return self._with_patches(inputs)
        embedding = self.visual(inputs)
        if not isinstance(embedding, Tensor):
            raise InputError(
                f"The image tower {type(self.visual).__name__} returns a "
                f"{type(embedding).__name__}; only towers that return one embedding can be trained."
            )
        return embedding

    def _with_patches(self, inputs: Tensor) -> tuple[Tensor, Patches]:
        """Raises InputError for towers whose patches have no embedding beside the texts'."""
        visual = self.visual
        if (
            not isinstance(visual, VisionTransformer)
            or visual.pool_type != "tok"
            or visual.attn_pool is not None
            or visual.final_ln_after_pool
        ):
            raise InputError(
                f"The patches of the image tower {type(visual).__name__} have no embeddings in the "
                "space of the texts; expected a vision transformer with a class token, such as "
                "ViT-B-32."
            )
        before, visual.output_tokens = visual.output_tokens, True
        try:
            embedding, tokens = visual(inputs)
        finally:
            visual.output_tokens = before
        patches = tokens if visual.proj is None else tokens @ visual.proj
        rows, columns = visual.grid_size
        return embedding, Patches(patches, (rows, columns), (inputs.shape[2], inputs.shape[3]))


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
    """A frozen model. ``known`` holds its embeddings of all clean training images, or None.

    With ``patches``, its outputs have the embeddings of patches.
    """

    def __init__(self, tower: Tower, head: Head, *, patches: bool = False) -> None:
        self.tower = tower.eval().requires_grad_(False)
        self.head = head
        self.patches = patches
        self.known: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Output:
        if self.patches:
            embedding, patches = self.tower(images, patches=True)
            return Output(embedding.float(), self.head, patches)
        return Output(self.tower(images).float(), self.head)

    def recall(self, indices: Tensor) -> Output | None:
        """The known outputs on the clean training images ``indices``; None without ``known``."""
        if self.known is None:
            return None
        rows = self.known[indices]
        return Output(rows.to(self.head.embeddings.device), self.head)


Teachers = Mapping[Role, Teacher]
