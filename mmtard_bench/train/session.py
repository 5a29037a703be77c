"""A whole training run: from a recipe to a checkpoint, resumable at any moment."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.device import describe
from mmtard_bench.evaluation.processes import end_with_launcher
from mmtard_bench.files import only_process, write_atomically
from mmtard_bench.models import adapters
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_model
from mmtard_bench.models.specs import is_data
from mmtard_bench.tasks.prompts import require_distinct
from mmtard_bench.tasks.samples import TaskData, load_task, load_training_data
from mmtard_bench.tasks.tables import resolve_task
from mmtard_bench.train.batch_norm import normalises_over_batch, synchronise
from mmtard_bench.train.checkpoint import (
    CARD,
    Card,
    Origin,
    Progress,
    States,
    claim,
    read_card,
    settle_origin,
    write_model,
    write_weights,
)
from mmtard_bench.train.data import Images, Order, learn_by_heart
from mmtard_bench.train.figures import diagnostics
from mmtard_bench.train.loop import Trainer
from mmtard_bench.train.methods import find_method
from mmtard_bench.train.methods.base import Method, Options
from mmtard_bench.train.progress import TrainProgress
from mmtard_bench.train.recipe import Named
from mmtard_bench.train.towers import Head, Role, Teacher, Tower, head_of, require_apart
from mmtard_bench.train.watch import Figures, History, Validator, deciles, figures_of


@dataclass(frozen=True)
class Place:
    """Where a run happens and what it leaves: all that is not in the recipe."""

    folder: Path
    seed: int = 0
    resume: bool = False
    cpu: bool = False
    trackers: Sequence[str] = ()
    adapter: bool = False


def train(named: Named, place: Place, console: Console) -> Card:
    """Train a recipe's student in ``place.folder``, or resume it there.

    Interrupted, it saves its state first. Raises InputError for whatever is wrong with the
    recipe, its models, its data or the directory; what was saved before stays.
    """
    end_with_launcher()
    method, options = find_method(named.recipe.method, named.recipe.options)
    _require_teachers(named, [role for role, _ in method.outputs(options)])
    accelerator = _accelerator(named, place)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            claim(place.folder, resume=place.resume)
            stack.enter_context(only_process(place.folder))
        accelerator.wait_for_everyone()
        session = Session(named, place, method, options, accelerator, console)
        return session.run()


def _require_teachers(named: Named, roles: Sequence[Role]) -> None:
    needed = {role for role in roles if role != "original"}
    missing = sorted(needed - set(named.recipe.teachers))
    if missing:
        raise InputError(
            f"The method {named.recipe.method} needs a {' and a '.join(missing)} teacher, which "
            f"the recipe {named.name} does not name; add it under [teachers], or --set "
            f"teachers.{missing[0]}=MODEL."
        )


def _accelerator(named: Named, place: Place) -> Accelerator:
    recipe = named.recipe
    there = {str(name) for name in get_available_trackers()}
    for tracker in place.trackers:
        if tracker not in there:
            raise InputError(
                f"The tracker '{tracker}' is unknown, or its package is not installed; there is "
                f"{', '.join(sorted(there)) or 'none'}. pip install 'mmtard-bench[tensorboard]' or "
                "'mmtard-bench[wandb]' brings one."
            )
    if place.adapter and recipe.lora is None:
        raise InputError(
            f"--adapter saves LoRA's adapters, but the recipe {named.name} has no [lora]; leave "
            "it out, or train with --set lora.rank=16 and so on."
        )
    # accelerate keeps a process's first precision; a process may train twice, in another one.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        # Without saying so, several processes on a CPU would each train on their own.
        cpu=place.cpu or not torch.accelerator.is_available(),
        log_with=list(place.trackers) or None,
        project_dir=str(place.folder),
    )
    if recipe.batch % accelerator.num_processes:
        raise InputError(
            f"batch = {recipe.batch} cannot be divided among {accelerator.num_processes} "
            "processes; it is the number of images a step over all of them."
        )
    return accelerator


class Session:
    """The parts of a run and the loop over its steps."""

    def __init__(
        self,
        named: Named,
        place: Place,
        method: Method,
        options: Options,
        accelerator: Accelerator,
        console: Console,
    ) -> None:
        self.named, self.recipe, self.place = named, named.recipe, place
        self.method, self.options = method, options
        self.accelerator = accelerator
        self.console = console
        self.main = accelerator.is_main_process
        self.states = States(place.folder, self.recipe.keep, self.recipe.steps)
        self.history = History(place.folder)
        self.seconds = 0.0
        self.metrics: Figures = {}

    def run(self) -> Card:
        """Train from the newest state, or from the start; a finished run's card is read."""
        # Dropout is the one thing that draws from the process's own stream.
        set_seed(self.place.seed, device_specific=True)
        self._load_models()
        settle_origin(self.place.folder, self.origin, main=self.main)
        card = read_card(self.place.folder)
        if card is not None:
            self._say(f"{self.place.folder} is finished already.")
            return card
        self._prepare()
        begin = self._restore()
        if self.main:
            self.history.start(begin)
        if self.place.trackers:
            self.accelerator.init_trackers("tracker")
        self._know()
        with TrainProgress(self.console, self.recipe.steps, begin, quiet=not self.main) as progress:
            self._steps(begin, progress)
        self.accelerator.end_training()
        return self._finish()

    def _say(self, text: str) -> None:
        if self.main:
            self.console.print(text, markup=False, soft_wrap=True)

    def _restore(self) -> int:
        """Load the newest state; returns the step to resume from, 0 without one."""
        found = self.states.latest()
        if found is None:
            return 0
        folder, progress = found
        try:
            self.accelerator.load_state(str(folder))
        except Exception as error:  # torch, pickle, safetensors and system errors: no common base
            raise InputError(
                f"The state {folder} cannot be read ({type(error).__name__}). Delete it, and "
                "--resume continues from the state before."
            ) from error
        self.seconds, self.trainer.memory = progress.seconds, progress.memory
        self._say(f"Going on from step {progress.step}.")
        for line in self.history.read():
            self.metrics |= {k: v for k, v in line.items() if k.startswith("validation/")}
        return progress.step

    def _load_models(self) -> None:
        recipe = self.recipe
        teachers = {f"{role} teacher": spec for role, spec in recipe.teachers.items()}
        for role, spec in {"student": recipe.student, **teachers}.items():
            if not is_data(spec):
                self._say(f"The recipe has code run: its {role} is made by {spec}.")
        self.data = load_training_data(resolve_task(recipe.train), labelled=self.method.labels)
        if self.method.classes and not self.data.classes:
            raise InputError(
                f"{self.data.task.data} has no class names, which the method {recipe.method} "
                "needs; give classes = [...] or classes_file = ... in [train]."
            )
        self.student = load_model(recipe.student)
        if self.student.config is None:
            raise InputError(
                f"The student '{recipe.student}' has no open_clip configuration, so it could not "
                "be saved; expected an open_clip architecture, directory or repository."
            )
        # In the order of the method on every process: figures are joined by position.
        roles = dict.fromkeys(role for role, _ in self.method.outputs(self.options))
        self.teachers = {role: self._teacher(role) for role in roles}
        for role, (clip, _) in self.teachers.items():
            require_apart(self.student, clip, f"{role} teacher")
        digests = {"student": self.student.digest, "data": self.data.revision}
        digests |= {f"{role} teacher": clip.digest for role, (clip, _) in self.teachers.items()}
        self.origin = Origin(
            recipe=recipe.meaning,
            seed=self.place.seed,
            processes=self.accelerator.num_processes,
            digests=digests,
        )

    def _prepare(self) -> None:
        recipe = self.recipe
        tower = Tower(self.student)
        tower.requires_grad_(True)
        if recipe.lora is not None:
            from mmtard_bench.train.lora import add_lora

            add_lora(tower.visual, **recipe.lora.model_dump())
        self.student.to(self.accelerator.device)
        if recipe.batch == 1 and normalises_over_batch(tower):
            raise InputError(
                f"batch = 1 leaves the batch normalisation of the student '{recipe.student}' a "
                "single image; expected at least 2."
            )
        if self.accelerator.num_processes > 1:
            synchronise(tower)
        self.trainer = Trainer(
            recipe,
            self.method,
            self.options,
            tower=tower,
            head=self._head(self.student, self.data),
            teachers={role: teacher for role, (_, teacher) in self.teachers.items()},
            accelerator=self.accelerator,
            seed=self.place.seed,
        )
        validation = load_task(resolve_task(recipe.validation.task), n=None, seed=0)
        self.validator = Validator(
            validation,
            recipe.validation.samples,
            head=self._head(self.student, validation),
            preprocess=self.student.preprocess,
            trainer=self.trainer,
        )
        self.images = Images(self.data, self.student.preprocess, recipe.surface)
        self.order = Order(len(self.images), recipe.batch, self.place.seed)
        self.labels = torch.tensor(self.data.labels)

    def _head(self, clip: Clip, data: TaskData) -> Head:
        if data.classes:
            require_distinct(clip, data)
        return head_of(clip, data.classes, data.templates, self.accelerator.device)

    def _teacher(self, role: Role) -> tuple[Clip, Teacher]:
        recipe = self.recipe
        clip = load_model(recipe.student if role == "original" else recipe.teachers[role])
        clip.to(self.accelerator.device)
        head = self._head(clip, self.data)
        return clip, Teacher(Tower(clip), head, patches=self.method.patches)

    def _know(self) -> None:
        """Let teachers learn by heart what they say of clean images, if training comes back.

        It takes part in the seconds of training, and is kept until the run is finished. Embeddings
        of patches would be too large to keep.
        """
        recipe = self.recipe
        if self.method.patches or recipe.steps * recipe.batch <= len(self.images):
            return
        for role, view in self.method.outputs(self.options):
            if view != "clean":
                continue
            path = self._memory(role)
            teacher = self.teachers[role][1]
            if path.exists():
                teacher.known = _read_memory(path, len(self.images))
                continue
            started = time.monotonic()
            self._say(f"The {role} teacher looks at {len(self.images)} images.")
            teacher.known = learn_by_heart(teacher, self.images, recipe.workers, self.accelerator)
            self.seconds += time.monotonic() - started
            if self.main:
                write_weights(path, {"embeddings": teacher.known})
        self.accelerator.wait_for_everyone()

    def _memory(self, role: Role) -> Path:
        return self.place.folder / "states" / f"memory-{role}.safetensors"

    def _steps(self, begin: int, progress: TrainProgress) -> None:
        recipe, size = self.recipe, self.recipe.batch // self.accelerator.num_processes
        first = self.accelerator.process_index * size
        shares = [self.order(step)[first : first + size] for step in range(begin, recipe.steps)]
        batches = self.images.batches([share.tolist() for share in shares], recipe.workers)
        with interruption() as asked:
            for step, share in enumerate(shares, begin):
                self._step(step, share, next(batches), progress)
                if self._any(asked()) and step + 1 < recipe.steps:
                    self._save(step + 1)
                    raise KeyboardInterrupt

    def _any(self, asked: bool) -> bool:
        """Whether any process was interrupted: all stop after the same step, as all must save."""
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _step(self, step: int, share: Tensor, images: Tensor, progress: TrainProgress) -> None:
        recipe, done = self.recipe, step + 1
        started = time.monotonic()
        learned = self.trainer.step(step, images, share, self.labels[share])
        self.seconds += time.monotonic() - started
        last = done == recipe.steps
        if done % recipe.log_every == 0 or done == 1 or last:
            figures, weights = figures_of(self.trainer, learned)
            self._note(done, figures, weights)
            progress.show(figures, {name: float(w.mean()) for name, w in weights.items()})
        if done % recipe.validation.every == 0 or last:
            self.metrics = self.validator()
            self._note(done, self.metrics, {})
            progress.show(self.metrics, {})
        if done % recipe.save_every == 0 or last:
            self._save(done)
        progress.advance(done)

    def _note(self, step: int, figures: Figures, weights: dict[str, Tensor]) -> None:
        if not self.main:
            return
        line: dict[str, object] = {"step": step, "seconds": round(self.seconds, 3), **figures}
        line |= {f"weights/{name}": values for name, values in deciles(weights).items()}
        self.history.append(line)
        self.accelerator.log(figures, step=step)
        if "tensorboard" in self.place.trackers:
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            for name, values in weights.items():
                writer.add_histogram(f"weights/{name}", values, step)

    def _save(self, step: int) -> None:
        progress = Progress(step=step, seconds=self.seconds, memory=dict(self.trainer.memory))

        def write(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            self.accelerator.wait_for_everyone()

        self.states.save(write, progress, main=self.main)

    def _finish(self) -> Card:
        """Write the model, then its card: a directory with a card is whole."""
        folder = self.place.folder
        card = Card(
            recipe_name=self.named.name,
            recipe=self.recipe.model_dump(),
            recipe_digest=self.recipe.digest,
            origin=self.origin,
            seconds=round(self.seconds, 1),
            trainable_parameters=self.trainer.trainable,
            metrics=self.metrics,
            weights_digest="0" * 64,
            environment=describe(self.accelerator.device, self.recipe.batch),
        )
        if self.main:
            assert self.student.config is not None
            write_model(folder, self._weights(), self.student.config)
            diagnostics(list(self.history.read()), folder / "diagnostics.png")
            # Read back: what ships is what was written, and it can be loaded.
            digest = load_model(f"local-dir:{folder}").digest
            card = card.model_copy(update={"weights_digest": digest})
            write_atomically(folder / CARD, card.model_dump_json(indent=1) + "\n")
            for role in self.teachers:
                self._memory(role).unlink(missing_ok=True)
        return card

    def _weights(self) -> dict[str, Tensor]:
        module = cast("torch.nn.Module", self.student.module)
        if self.recipe.lora is None:
            return dict(module.state_dict())
        from mmtard_bench.train.lora import adapter_files, merged

        visual = self.trainer.tower.visual
        if self.place.adapter:
            folder = self.place.folder / "adapter"
            weights, config = adapter_files(visual, **self.recipe.lora.model_dump())
            write_weights(folder / adapters.WEIGHTS, weights)
            write_atomically(folder / adapters.CONFIG, json.dumps(config, indent=1) + "\n")
        rest = {k: v for k, v in module.state_dict().items() if not k.startswith("visual.")}
        return rest | {f"visual.{key}": value for key, value in merged(visual).items()}


def _read_memory(path: Path, images: int) -> Tensor:
    try:
        known = load_file(path)["embeddings"]
        why = "" if known.ndim == 2 and len(known) == images else f"shape {tuple(known.shape)}"
    except Exception as error:  # safetensors and system errors have no common base
        why = type(error).__name__
    if why or not known.isfinite().all():
        raise InputError(
            f"{path} does not hold an embedding for each of {images} images "
            f"({why or 'not finite'}); delete it, and the teacher looks at the images again."
        )
    return known


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C (SIGINT) was pressed: training then stops after the step.

    A second Ctrl-C raises KeyboardInterrupt at once. What comes within a second is the first one,
    since a terminal and a launcher both pass it on.
    """
    pressed: list[float] = []

    def ask(*_: object) -> None:
        pressed.append(time.monotonic())
        if pressed[-1] - pressed[0] > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
