"""mmtard_bench: how robust is a CLIP-like vision-language model, really?

The names below are the public interface. They are imported on first use, so that what needs no
torch (the leaderboard, the records) does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmtard_bench.errors import InputError as InputError
    from mmtard_bench.evaluation.evaluate import evaluate as evaluate
    from mmtard_bench.models.clip import Clip as Clip, Preprocess as Preprocess
    from mmtard_bench.models.loading import load_model as load_model
    from mmtard_bench.records.files import read_record as read_record
    from mmtard_bench.records.schema import Record as Record
    from mmtard_bench.registry import (
        register_attack as register_attack,
        register_dataset as register_dataset,
        register_model as register_model,
        register_task as register_task,
    )
    from mmtard_bench.types import Task as Task, ThreatModel as ThreatModel

__version__ = "0.1.0"

_WHERE = {
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

__all__ = sorted(_WHERE)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'mmtard_bench' has no attribute '{name}'")
    return getattr(import_module(f"mmtard_bench.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
