"""Everything that a suite and models need, into the cache: afterwards no network is needed."""

from collections.abc import Callable, Sequence
from functools import partial

import open_clip

from mmtard_bench.data.webdataset import hub_repository
from mmtard_bench.errors import InputError
from mmtard_bench.hub import Kind, check_cache, told
from mmtard_bench.models.loading import load_model
from mmtard_bench.models.openclip import tag_repository
from mmtard_bench.models.specs import parts_of
from mmtard_bench.tasks.samples import load_task
from mmtard_bench.types import Suite, Task


def fetch(suite: Suite, models: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Download what a run of the suite would, and check it; ``say`` gets a line for each thing.

    What is in the cache already is checked against the hub's checksums and, if it is damaged,
    downloaded again. Returns what could not be fetched, as sentences: one failure does not keep
    the rest from being fetched.
    """
    problems = []
    steps = [(f"{task.name}: ", partial(_fetch_task, task, suite, say)) for task, _ in suite.plan]
    steps += [("", partial(_fetch_model, spec, say)) for spec in models]
    with told(say):
        for name, step in steps:
            try:
                step()
            except InputError as error:
                problems.append(f"{name}{error}")
                say(f"FAILED: {problems[-1]}")
    return problems


def _fetch_task(task: Task, suite: Suite, say: Callable[[str], None]) -> None:
    repository = hub_repository(task)
    if repository is not None:
        _check(repository[0], "dataset", say)
    data = load_task(task, n=suite.n, seed=suite.seed, skip_damaged=suite.skip_damaged)
    data.require_images("model")
    say(f"{task.name}: {len(data.labels)} samples, {len(data.classes)} classes, {data.revision}")
    for note in data.notes:
        say(f"{task.name}: {note}")


def _fetch_model(spec: str, say: Callable[[str], None]) -> None:
    repository = _model_repository(spec)
    if repository is not None:
        _check(repository, "model", say)
    clip = load_model(spec)
    say(f"{clip.name}: weights {clip.digest[:8]}")


def _check(repository: str, kind: Kind, say: Callable[[str], None]) -> None:
    """Take damaged files out of the cache; what is downloaded after that is checked as it comes."""
    count, damaged = check_cache(repository, kind)
    for name in damaged:
        say(f"{repository}: {name} in the cache was damaged and is removed")
    if count:
        say(f"{repository}: {count} files in the cache, checked")


def _model_repository(spec: str) -> str | None:
    """The hub repository that a model comes from, where its name says so."""
    scheme, _, rest = parts_of(spec)[0].partition(":")
    if scheme in ("hf-hub", "transformers"):
        return rest.partition("@")[0]
    known = open_clip.get_pretrained_cfg(scheme, rest) if scheme and rest else None
    return tag_repository(known or {}) or None
