"""mmtard_bench: how robust is a CLIP-like vision-language model, really?

The names below are the public interface. They are imported on first use, so that what needs no
torch (the leaderboard, the records) does not wait for it.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmtard_bench.api import (
        Attacked as Attacked,
        attack as attack,
        frame as frame,
        list_attacks as list_attacks,
        list_datasets as list_datasets,
        list_models as list_models,
        list_tasks as list_tasks,
        run as run,
    )
    from mmtard_bench.errors import InputError as InputError
    from mmtard_bench.evaluation.evaluate import evaluate as evaluate
    from mmtard_bench.models.clip import Clip as Clip, Preprocess as Preprocess
    from mmtard_bench.models.loading import load_model as load_model
    from mmtard_bench.records.compare import compare as compare
    from mmtard_bench.records.files import read_record as read_record
    from mmtard_bench.records.schema import Record as Record
    from mmtard_bench.registry import (
        register_attack as register_attack,
        register_dataset as register_dataset,
        register_model as register_model,
        register_task as register_task,
    )
    from mmtard_bench.tasks.memory import task_of as task_of
    from mmtard_bench.tasks.suites import list_suites as list_suites
    from mmtard_bench.types import Task as Task, ThreatModel as ThreatModel

__version__ = "0.1.0"

_WHERE = {
    "Attacked": "api",
    "attack": "api",
    "compare": "records.compare",
    "frame": "api",
    "list_attacks": "api",
    "list_datasets": "api",
    "list_models": "api",
    "list_suites": "tasks.suites",
    "list_tasks": "api",
    "run": "api",
    "task_of": "tasks.memory",
    "Clip": "models.clip",
    "InputError": "errors",
    "Preprocess": "models.clip",
    "Record": "records.schema",
    "Task": "types",
    "ThreatModel": "types",
    "evaluate": "evaluation.evaluate",
    "load_model": "models.loading",
    "read_record": "records.files",
    "register_attack": "registry",
    "register_dataset": "registry",
    "register_model": "registry",
    "register_task": "registry",
}

__all__ = sorted([*_WHERE, "records"])  # noqa: PLE0605


class _Records(ModuleType):
    """The folder ``records``, which is also the function ``mb.records``."""

    def __call__(self, path: str | Path) -> "list[Record]":
        from mmtard_bench.leaderboard.entries.folder import records

        return records(path)


# Importing any module of the folder sets ``mmtard_bench.records`` to the folder's module, which
# would hide a function of that name. So the module itself is callable.
import_module("mmtard_bench.records").__class__ = _Records


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'mmtard_bench' has no attribute '{name}'")
    return getattr(import_module(f"mmtard_bench.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
