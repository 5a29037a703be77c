"""A model of which each sample is robust, or broken, by its own pixels: known verdicts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import mmtard_bench as mb
from mmtard_bench.attacks.base import Attack, Engine, EngineName
from mmtard_bench.attacks.fast import ensemble
from mmtard_bench.attacks.fast.rows import Search
from mmtard_bench.evaluation.job import Job, prepare
from mmtard_bench.models.clip import Clip, Preprocess
from mmtard_bench.tasks.samples import TaskData, load_task
from mmtard_bench.types import Eps, ThreatModel

SIDE = 8
KINDS = ("robust", "easy", "masked", "wrong")
"""Robust against everything; broken by the first step; broken by no gradient of the cross-entropy,
which is zero there; misclassified without an attack."""


class Chosen(nn.Module):
    """A CLIP whose image tower reads a sample's kind off its first pixel.

    Its first feature is the margin of class 0: linear in the pixels where the sample can be broken.
    """

    SHIFTS = (30.0, 0.2, 4.7, -2.0)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randint(2, (3, SIDE, SIDE), generator=generator) * 2.0 - 1)
        self.noise = torch.randn(3, SIDE, SIDE, generator=generator)
        self.logit_scale = nn.Parameter(torch.tensor(320.0).log())

    def encode_image(self, images: Tensor) -> Tensor:
        inside = torch.ones(SIDE, SIDE)
        inside[0, 0] = 0
        sums = ((images - 0.5) * self.weight * inside).flatten(1).sum(1)
        kind = (images[:, 0, 0, 0] * (len(KINDS) - 1)).round().long()
        margin = sums + torch.tensor(self.SHIFTS)[kind]
        fixed = torch.tensor([0.0, 0.0, 0.0, 10.0]).repeat(len(images), 1)
        # No two images have the same logits, and no gradient comes from here.
        fixed[:, 0] = 1e-3 * (images.detach() * self.noise).flatten(1).sum(1)
        return torch.cat([margin[:, None], fixed], 1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return torch.eye(5)[tokens[:, 0]]


def toy_clip() -> Clip:
    preprocess = Preprocess((SIDE, SIDE), (0.0,) * 3, (1.0,) * 3)
    return Clip(
        Chosen(), lambda texts: torch.tensor([[int(t[-1])] for t in texts]), preprocess, "t"
    )


def toy_data(folder: Path, count: int) -> TaskData:
    """``count`` samples of each kind; sample i is of the kind i modulo 4."""
    rng = np.random.default_rng(0)
    images = rng.integers(126, 130, (count * len(KINDS), SIDE, SIDE, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = [85 * (i % len(KINDS)) for i in range(len(images))]
    names = [f"{i:03d}-{KINDS[i % len(KINDS)]}" for i in range(len(images))]
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=[str(i) for i in range(4)]),
        id=datasets.Value("string"),
    )
    columns = {"image": [*map(Image.fromarray, images)], "label": [0] * len(images), "id": names}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "toy.parquet")
    return load_task(mb.Task("toy", f"parquet:{folder / 'toy.parquet'}", ("{}",)), n=None, seed=0)


def kind_of(name: str) -> str:
    return name.partition("-")[2]


def toy_job(
    clip: Clip, data: TaskData, name: str, *, eps: str = "8/255", engine: EngineName = "fast"
) -> Job:
    """A job of the toy; each stage of the fast engine has a few steps, or queries."""
    real = ensemble.staged

    def shrunk(threat: ThreatModel, stages: Sequence[Search], *rest: Any) -> Attack:
        return real(threat, [replace(s, steps=min(s.steps, 4)) for s in stages], *rest)

    with mock.patch.object(ensemble, "staged", shrunk):
        threat = ThreatModel(name, "linf", Eps.parse(eps))
        return prepare(clip, data, threat, seed=0, engine=Engine(engine))
