"""Files of adversarial images, quantised so that they still break their samples.

The format is safetensors. Tensors "0", "1", ... each hold the images of one task and ball as a
stack (N, H, W, 3) of 8 or 16 bits per channel. The header describes each stack (``Contents``). A
stranger may have written the file: sizes and header are checked before an image is read.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from mmtard_bench.errors import InputError, first_line
from mmtard_bench.evaluation.again import attack_again
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.checks import inside
from mmtard_bench.evaluation.device import Resources, full_float32
from mmtard_bench.evaluation.sources import chosen, data_of, suite_of, threat_of
from mmtard_bench.files import write_atomically
from mmtard_bench.leaderboard.entries.breaks import PixelBall
from mmtard_bench.leaderboard.entries.text import Plain, SuiteName
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.schema import Name, Record
from mmtard_bench.records.worst import Ball, balls_of
from mmtard_bench.schema import Strict, explain
from mmtard_bench.tasks.prompts import understood
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.types import Eps, ThreatModel

LARGEST = 4 * 2**30
"""The largest file, in bytes: 13 tasks of 1,000 images at 224x224 in two balls nearly fill it."""

_KEY = "mmtard_bench"
_KINDS: dict[str, int] = {"U8": 255, "U16": 65535}
"""The allowed types of tensors, with the value of white."""

Pixels = NDArray[Any]


class Stack(PixelBall):
    """The adversarial images of one task and ball: one image for each sample in ``ids``."""

    suite: SuiteName
    attack: Plain
    ids: list[str] = Field(min_length=1)

    @model_validator(mode="after")
    def _once(self) -> "Stack":
        if len(set(self.ids)) < len(self.ids):
            raise ValueError("a sample occurs twice in one stack")
        return self

    @property
    def name(self) -> str:
        """The task and the ball, for messages."""
        return f"{self.task} {self.norm} {self.eps} {self.surface}"


class Contents(Strict):
    """The header of a file. ``model`` is the digest of the model that the images were made for."""

    version: Literal[1]
    model: Name
    stacks: list[Stack] = Field(min_length=1, max_length=10_000)


@dataclass(frozen=True)
class Adversarials:
    """A file of adversarial images; ``digest`` is its SHA-256."""

    path: Path
    digest: str
    contents: Contents

    def size(self, place: int) -> tuple[int, int]:
        """The height and width of the images of a stack."""
        with safe_open(self.path, "np") as file:
            _, height, width, _ = file.get_slice(str(place)).get_shape()
        return height, width

    def images(self, place: int, rows: range) -> Tensor:
        """The images of a stack in ``rows``: (N, 3, H, W), float32 in [0, 1]."""
        with safe_open(self.path, "np") as file:
            return as_images(file.get_slice(str(place))[rows.start : rows.stop])


def as_images(pixels: Pixels) -> Tensor:
    """Integers (N, H, W, 3) of 8 or 16 bits as float32 (N, 3, H, W) in [0, 1]."""
    white = np.iinfo(pixels.dtype).max
    flat = torch.from_numpy(pixels.astype(np.float32)) / float(white)
    return flat.permute(0, 3, 1, 2).contiguous()


def read_adversarials(path: str | Path) -> Adversarials:
    """Read the header of a file of adversarial images. Raises InputError for any other file."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"it has {size:,} bytes; expected at most {LARGEST:,}.")
        with safe_open(path, "np") as file:
            contents = Contents.model_validate_json((file.metadata() or {}).get(_KEY, "null"))
            _require_shapes(file, contents)
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
    except ValidationError as error:
        why = explain(error)
    except ValueError as error:
        why = str(error)
    except (OSError, SafetensorError) as error:
        why = first_line(error)
    else:
        return Adversarials(path, digest, contents)
    raise InputError(f"{path} is not a file of adversarial images: {why}")


def _require_shapes(file: Any, contents: Contents) -> None:
    names = [str(place) for place in range(len(contents.stacks))]
    if sorted(file.keys()) != sorted(names):
        raise ValueError(f"its header has {len(names)} stacks, but its tensors are others.")
    for name, stack in zip(names, contents.stacks, strict=True):
        tensor = file.get_slice(name)
        shape, kind = tensor.get_shape(), tensor.get_dtype()
        if kind not in _KINDS or len(shape) != 4 or shape[0] != len(stack.ids) or shape[3] != 3:
            raise ValueError(
                f"tensor {name} is {kind} of {shape}; expected U8 or U16, ({len(stack.ids)}, H, W, "
                "3)."
            )


def write_adversarials(
    path: str | Path, model: str, stacks: Sequence[tuple[Stack, Pixels]]
) -> Adversarials:
    """Write a file of adversarial images, for ``mmtard-bench break --adversarials``.

    Args:
        path: The file.
        model: The digest of the model that the images were made for (``Clip.digest``).
        stacks: Each task and ball with its images, (N, H, W, 3) of uint8 or uint16, where the
            largest number is white.

    Returns:
        What ``read_adversarials`` reads from the file.

    Raises:
        InputError: If the images have another shape or type, or the file cannot be written.
    """
    path = Path(path)
    contents = Contents(version=1, model=model, stacks=[stack for stack, _ in stacks])
    tensors = {str(i): np.ascontiguousarray(pixels) for i, (_, pixels) in enumerate(stacks)}
    write_atomically(path, save(tensors, {_KEY: contents.model_dump_json()}))
    return read_adversarials(path)


@dataclass(frozen=True)
class Replayed:
    """The ids of a stack's samples, by the result of a new pass over their images."""

    outside: list[str]
    unbroken: list[str]
    broken: list[str]


@full_float32()
def replay_stack(
    file: Adversarials, place: int, data: TaskData, clip: Clip, resources: Resources
) -> Replayed:
    """Classify the images of a stack and check that they lie in the ball and the box [0, 1].

    An image breaks its sample if the model classifies the clean image correctly, but not this one.

    Raises:
        InputError: If the task does not have a sample, or if the images have another size.
    """
    stack = file.contents.stacks[place]
    data = understood(clip, chosen(data, stack.ids))
    eps = Eps.parse(stack.eps, norm=stack.norm)
    bench = Bench(clip, data, stack.surface, resources)
    replayed = Replayed([], [], [])
    given, expected = file.size(place), tuple(bench.images([0]).shape[2:])
    if given != expected:
        raise InputError(
            f"{file.path}, {stack.name}: its images are {given}; those of the task are {expected}."
        )
    for rows in bench.chunks():
        clean, found = bench.images(rows), file.images(place, rows).to(bench.device)
        good = inside(found, clean, norm=stack.norm, eps=float(eps)).tolist()
        before, after = bench.judge(clean, rows), bench.judge(found, rows)
        for row, was, now, within in zip(rows, before, after, good, strict=True):
            group = replayed.broken if was.right and not now.right else replayed.unbroken
            (group if within else replayed.outside).append(stack.ids[row])
    return replayed


def gather(
    clip: Clip,
    records: Sequence[Record],
    resources: Resources,
    *,
    seed: int,
    tell: Callable[[str], None],
) -> list[tuple[Stack, Pixels]]:
    """Re-attack the broken samples of records and keep an image per sample, task and ball.

    Attacks on text have no images. ``tell`` receives a message about each ball: how many samples
    have an image, how many were not broken again, and how many images break nothing after
    quantisation.

    Raises:
        InputError: If the suite, the data or the attack of a record is not available.
    """
    stacks: list[tuple[Stack, Pixels]] = []
    for ball in balls_of(records):
        if ball.edits:
            tell(f"{ball.task} {ball.name}: left out, because its attacks change text")
        elif ball.broken:
            stacks += _gather(clip, ball, resources, seed=seed, tell=tell)
    return stacks


@full_float32()
def _gather(
    clip: Clip, ball: Ball, resources: Resources, *, seed: int, tell: Callable[[str], None]
) -> list[tuple[Stack, Pixels]]:
    record = ball.strongest
    suite, threat = suite_of(record), threat_of(record)
    data = understood(clip, chosen(data_of(record, suite), ball.broken))
    images = {
        outcome.id: outcome.adversarial
        for outcome in attack_again(clip, data, threat, resources, seed=seed)
        if outcome.broken and outcome.adversarial is not None
    }
    stacks = []
    for ids, pixels in quantised(Bench(clip, data, threat.surface, resources), threat, images):
        stack = Stack(
            suite=suite.name,
            task=ball.task,
            norm=threat.pixel_norm,
            eps=str(threat.eps),
            surface=threat.surface,
            attack=threat.attack,
            ids=ids,
        )
        stacks.append((stack, pixels))
    fit = sum(len(stack.ids) for stack, _ in stacks)
    line = f"{ball.task} {ball.name}: images of {fit} of {len(ball.broken)} broken samples"
    if missing := len(ball.broken) - len(images):
        line += f"; {missing} were not broken again"
    if unfit := len(images) - fit:
        line += f"; {unfit} images break nothing after quantisation"
    tell(line)
    return stacks


def quantised(
    bench: Bench, threat: ThreatModel, images: dict[str, Tensor]
) -> Iterator[tuple[list[str], Pixels]]:
    """Quantise adversarial images: yields ids and images (N, H, W, 3) of 8 bits, then of 16 bits.

    For each image the nearest 8-bit values are tried first, then 8-bit values rounded towards the
    clean image, then the same with 16 bits. The first form that lies in the ball and breaks the
    sample is kept. An image with no such form is left out.
    """
    order = {name: row for row, name in enumerate(bench.data.manifest.ids)}
    left = [name for name in order if name in images]
    for kind in (np.uint8, np.uint16):
        ids: list[str] = []
        kept: list[Pixels] = []
        for nearest in (True, False):
            size = bench.batch_size
            for some in [left[i : i + size] for i in range(0, len(left), size)]:
                rows = [order[name] for name in some]
                clean = bench.images(rows)
                wanted = torch.stack([images[name] for name in some])
                pixels = _rounded(wanted, clean.cpu(), kind, nearest=nearest)
                again = as_images(pixels).to(clean.device)
                good = inside(again, clean, norm=threat.pixel_norm, eps=float(threat.eps))
                verdicts = bench.judge(again, rows)
                for name, image, within, verdict in zip(
                    some, pixels, good.tolist(), verdicts, strict=True
                ):
                    if within and not verdict.right:
                        ids.append(name)
                        kept.append(image)
            left = [name for name in left if name not in set(ids)]
        if ids:
            yield ids, np.stack(kept)


def _rounded(images: Tensor, clean: Tensor, kind: Any, *, nearest: bool) -> Pixels:
    """Images (N, 3, H, W) as integers (N, H, W, 3), rounded to nearest or towards ``clean``."""
    white = np.iinfo(kind).max
    scaled = images.double() * float(white)
    if nearest:
        whole = scaled.round()
    else:
        slack = 1e-7 * white  # integers with a float32 rounding error stay as they are
        whole = torch.where(images >= clean, (scaled + slack).floor(), (scaled - slack).ceil())
    values = whole.clamp(0, white).permute(0, 2, 3, 1).numpy()
    return values.astype(kind)
