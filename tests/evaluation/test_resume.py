"""Kill -9 and resume at changing batch sizes, on a model of which nearly nothing breaks."""

import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mmtard_bench.records.files import read_record
from mmtard_bench.records.schema import Record
from tests.forked import Forked

SUITE = """
name = "robust-v1"
description = "a robust model at a small radius: most samples need the whole budget"
n = 24
seed = 0
tasks = ["digits/digit"]
threats = [{attack = "apgd-pair", norm = "linf", eps = "1/255"}]
"""
COMMAND = ["run", "robust-v1.toml", "--model", "teacher-robust", "--out"]


def start(folder: Path, out: str, size: int | None, said: Path) -> Forked:
    (folder / "robust-v1.toml").write_text(SUITE)
    words = [*COMMAND, out, *(["--batch-size", str(size)] if size else [])]
    return Forked(words, folder, {"HF_HUB_OFFLINE": "1"}, said)


def finish(process: Forked) -> str:
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, out + errors
    return out


def record_in(folder: Path) -> Record:
    (path,) = folder.rglob("*.json")
    assert not list(folder.rglob("*.partial*"))
    return read_record(path)


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("*.partial"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, "runs", 16, folder / "said"))
    return record_in(folder / "runs")


def content(record: Record) -> dict[str, object]:
    """A record without when and where it was made."""
    return record.model_dump(exclude={"seconds", "model_seconds", "created", "environment"})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kill_and_resume_at_changing_batch_sizes(tmp_path, uninterrupted, seed):
    chance = random.Random(seed)
    runs = tmp_path / "runs"
    for kill in range(chance.randint(1, 4)):
        process = start(tmp_path, "runs", chance.choice([8, 16, None]), tmp_path / str(kill))
        before = lines_in(runs)
        # Wherever it is then: loading, in the first stage, before a line, or after one.
        deadline = time.monotonic() + chance.uniform(1, 10)
        more = chance.random() < 0.7
        while process.poll() is None and time.monotonic() < deadline:
            if more and lines_in(runs) > before:
                break
            time.sleep(0.02)
        with suppress(ProcessLookupError):  # it may have finished just now
            process.kill()
        process.process.join()
    finish(start(tmp_path, "runs", chance.choice([8, 16, None]), tmp_path / "last"))
    assert content(record_in(runs)) == content(uninterrupted)
    shutil.rmtree(runs)
