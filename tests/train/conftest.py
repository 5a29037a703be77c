"""Training runs that take a second: few steps, small batches, the smallest student."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mmtard_bench.train.recipe import Named, load_recipe
from mmtard_bench.train.session import Place, train

SMALL = """
description = "a recipe for tests"
method = "ard"
student = "tiny-clip-small"
train = "digits/validation"
steps = 6
batch = 16
learning_rate = 1e-3
weight_decay = 1e-4
warmup = 0.2
clip_norm = 1.0
log_every = 1
save_every = 2

[teachers]
clean = "tiny-clip"
robust = "teacher-robust"

[attack]
eps = "8/255"
steps = 2
step_size = "6/255"

[validation]
task = "digits/validation"
samples = 20
every = 3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small recipe's file."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def small(recipe: Path) -> Callable[..., Named]:
    """The small recipe with ``key=value`` overrides."""
    return lambda *overrides: load_recipe(str(recipe), overrides)


@pytest.fixture
def run_small(small: Callable[..., Named], tmp_path: Path) -> Callable[..., Path]:
    """Train the small recipe in a directory below ``tmp_path``; returns the directory."""

    def run(name: str, *overrides: str, **place: object) -> Path:
        folder = tmp_path / name
        train(small(*overrides), Place(folder, cpu=True, **place), Console(quiet=True))
        return folder

    return run
