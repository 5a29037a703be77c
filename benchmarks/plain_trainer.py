"""One step of ``digits/mmt-ard`` against a plain implementation of the same step: a ratio.

The plain loop does what a short script does: both teachers embed the clean images at every step,
and the inner attack calls ``backward``, which also computes the gradients of the weights. The
trainer lets the teachers embed the data set once (that time is given apart) and asks for the
gradients of the pixels alone. Both see the same images, random starts and learning rates; the last
column says how far the weights are apart afterwards, relative to how far they moved.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from tabulate import tabulate
from torch import Tensor, nn

from mmtard_bench.models.loading import load_model
from mmtard_bench.tasks.samples import load_training_data
from mmtard_bench.tasks.tables import resolve_task
from mmtard_bench.train.data import Images, Order
from mmtard_bench.train.loop import learning_rate, uniform_start
from mmtard_bench.train.losses import kl
from mmtard_bench.train.methods import find_method
from mmtard_bench.train.recipe import Recipe, load_recipe
from mmtard_bench.train.session import Place, Session, train
from mmtard_bench.train.towers import Output, Tower, head_of
from mmtard_bench.types import Eps

CPU = torch.device("cpu")
WARM_UP = 3


@dataclass
class Batch:
    """What a method reads of a batch; see ``mmtard_bench.train.methods.base.Batch``."""

    labels: Tensor
    student: dict[str, Output]
    teachers: dict[str, Output]
    processes: int = 1
    memory: dict[str, float] = field(default_factory=dict)

    def teacher(self, role: str, _: str, /) -> Output:
        """The output of a teacher on clean images: mmt-ard asks for no other."""
        return self.teachers[role]

    def gather(self, rows: Tensor, /) -> Tensor:
        """The rows of the only process."""
        return rows


def plain(recipe: Recipe) -> tuple[dict[str, Tensor], float]:
    """Train by a plain loop; returns the weights of the tower and the seconds of a step."""
    method, options = find_method(recipe.method, recipe.options)
    data = load_training_data(resolve_task(recipe.train), labelled=True)
    models = {"student": recipe.student, **recipe.teachers}
    towers, heads = {}, {}
    for role, spec in models.items():
        clip = load_model(spec)
        towers[role] = Tower(clip).eval()
        heads[role] = head_of(clip, data.classes, data.templates, CPU)
        if role == "student":
            images = Images(data, clip.preprocess, recipe.surface)
    student = towers["student"].requires_grad_(True)
    optimiser = torch.optim.AdamW(
        student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    eps, size = (float(Eps.parse(t)) for t in (recipe.attack.eps, recipe.attack.step_size))
    order, labels = Order(len(images), recipe.batch, 0), torch.tensor(data.labels)
    began = time.perf_counter()
    for step in range(recipe.steps):
        if step == WARM_UP:
            began = time.perf_counter()
        rows = order(step)
        x = torch.stack([images[i] for i in rows.tolist()]).float() / 255
        with torch.no_grad():
            teachers = {r: Output(towers[r](x), heads[r]) for r in recipe.teachers}
        start = uniform_start(x.shape, recipe.attack, key=(0, "start", step), device=CPU)
        student.eval()
        moved = (x + start).clamp(0, 1)
        for _ in range(recipe.attack.steps):
            moved = moved.detach().requires_grad_()
            logits = Output(student(moved), heads["student"]).logits
            kl(teachers["clean"].logits, logits).sum().backward()
            moved = torch.clamp(moved + size * moved.grad.sign(), x - eps, x + eps).clamp(0, 1)
        optimiser.zero_grad()
        student.train()
        parts = student(torch.cat([x, moved.detach()])).chunk(2)
        views = {v: Output(p, heads["student"]) for v, p in zip(method.views, parts, strict=True)}
        loss = method.loss(Batch(labels[rows], views, teachers), options)
        torch.stack(list(loss.terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_norm)
        optimiser.param_groups[0]["lr"] = learning_rate(
            step, steps=recipe.steps, peak=recipe.learning_rate, warmup=recipe.warmup
        )
        optimiser.step()
    seconds = (time.perf_counter() - began) / (recipe.steps - WARM_UP)
    return {k: v.detach().clone() for k, v in student.visual.state_dict().items()}, seconds


def ours(overrides: list[str]) -> tuple[dict[str, Tensor], float, float]:
    """Train by the trainer; returns the weights, the seconds of a step and of the embedding."""
    ends, know = [], {}

    def step(session: Session, *arguments: object) -> None:
        real_step(session, *arguments)
        ends.append(time.perf_counter())

    def knowing(session: Session) -> None:
        began = time.perf_counter()
        real_know(session)
        know["seconds"] = time.perf_counter() - began

    real_step, real_know = Session._step, Session._know
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Session, "_step", step),
        mock.patch.object(Session, "_know", knowing),
    ):
        out = Path(folder) / "run"
        train(load_recipe("digits/mmt-ard", overrides), Place(out, cpu=True), Console(quiet=True))
        weights = load_model(f"local-dir:{out}").module.visual.state_dict()
    # The last step validates and writes the model; it is left out.
    per_step = (ends[-2] - ends[WARM_UP - 1]) / (len(ends) - 1 - WARM_UP)
    return weights, per_step, know["seconds"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    overrides = [f"steps={arguments.steps}", "validation.every=1000000", "learning_rate=1e-4"]
    overrides += ["save_every=1000000", "train=digits/validation"]
    recipe = load_recipe("digits/mmt-ard", overrides).recipe
    start = load_model(recipe.student).module.visual.state_dict()
    rows = []
    for _ in range(arguments.rounds):
        simple, slow = plain(recipe)
        trained, fast, once = ours(overrides)
        apart, moved = (
            sum(float((a[k].double() - b[k].double()).square().sum()) for k in b) ** 0.5
            for a, b in ((trained, simple), (simple, start))
        )
        times = [f"{1000 * slow:.0f}", f"{1000 * fast:.0f}", f"{slow / fast:.2f}", f"{once:.1f}"]
        rows.append([*times, f"{apart / moved:.1e}"])
    headers = ["plain, ms a step", "trainer, ms a step", "ratio", "embedding, s", "weights apart"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
