"""Entries of two small models on suites of a few samples."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtard_bench.tasks import suites
from tests.leaderboard.verify.forge import SUITES, entry, run

Copy = Callable[[str], Path]


@pytest.fixture(scope="session")
def small_suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small suites beside those that ship."""
    folder = tmp_path_factory.mktemp("suites")
    for path in suites.suite_folder().glob("*.toml"):
        shutil.copy(path, folder)
    for name, text in SUITES.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def honest(small_suites: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("board") / "entries"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "suite_folder", lambda: small_suites)
        return {
            "weak": entry(root, run("student-clean-ft", "small-v1"), "weak"),
            "strong": entry(root, run("student-tecoa", "small-v1"), "strong"),
            "curve": entry(root, run("student-tecoa", "bent-v1"), "curve"),
            "seen": entry(root, run("tiny-clip-small", "seen-v1"), "seen"),
        }


@pytest.fixture(autouse=True)
def shipped(small_suites: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "suite_folder", lambda: small_suites)


@pytest.fixture
def copy(honest: dict[str, Path], tmp_path: Path) -> Copy:
    """A copy of an honest entry in a leaderboard of its own."""

    def made(name: str) -> Path:
        folder = tmp_path / "board" / "entries" / name
        shutil.copytree(honest[name], folder)
        return folder

    return made
