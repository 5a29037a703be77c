"""Several processes: the record of one, whatever ends one of them, and how it goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.evaluation.device import find_device
from mmtard_bench.evaluation.processes import ALONE, Processes, joined
from mmtard_bench.records.files import read_record
from mmtard_bench.records.schema import Record
from tests.conftest import REPOSITORY, wait_for
from tests.forked import CONTEXT, Forked

SUITE = """
name = "{name}-v1"
description = "for several processes"
n = {n}
seed = 0
block = 4
tasks = {tasks}
threats = [{threats}]
"""
EPS = 'norm = "linf", eps = "8/255"'

Start = Callable[..., list[Forked]]
TINY = ("--model", "tiny-clip")

# Models that fail, or take their time, in one process or all.
MODEL = """
import os, time
from pathlib import Path
import mmtard_bench as mb

RANK = os.environ.get("RANK", "0")
Path(f"pid-{RANK}").write_text(str(os.getpid()))


def slow():
    clip = mb.load_model("tiny-clip")
    encode, calls = clip.module.encode_image, []

    def slowly(images):
        calls.append(len(images))
        if RANK == os.environ.get("FAILS") and len(calls) > 60:
            raise RuntimeError("out of memory")
        time.sleep(float(os.environ.get("NAP", "0")))
        return encode(images)

    clip.module.encode_image = slowly
    return clip


def picky():
    if RANK == "1":
        raise mb.InputError("Process 2 does not find its weights.")
    return mb.load_model("tiny-clip")
"""


def write_suite(folder: Path, name: str, tasks: list[str], attacks: list[str], n: int) -> str:
    threats = ", ".join(f'{{attack = "{attack}", {EPS}}}' for attack in attacks)
    text = SUITE.format(name=name, n=n, tasks=tasks, threats=threats)
    (folder / f"{name}-v1.toml").write_text(text)
    (folder / "doubles.py").write_text(MODEL)
    return f"{name}-v1.toml"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start ``mmtard-bench run`` as so many processes, told who they are as by a launcher.

    They work in one folder, or each in its own. None outlives the test.
    """
    started: list[Forked] = []

    def run(folders: Path | list[Path], *words: str, world: int = 2, **env: str) -> list[Forked]:
        wheres = folders if isinstance(folders, list) else [folders] * world
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank, where in enumerate(wheres):
            place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            told = env | (place if world > 1 else {})
            said = tmp_path_factory.mktemp("said") / str(rank)
            started.append(Forked(["run", *words], where, told, said))
        return started[-world:]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start two processes by torchrun, in the test's directory."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str, processes: int = 2, **env: str) -> subprocess.Popen[str]:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", "mmtard_bench", "run", *words],
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def finish(started: list[Forked]) -> list[tuple[int, str, str]]:
    """The exit status of each, and what it said on stdout and stderr."""
    said = [process.communicate(timeout=240) for process in started]
    for _, errors in said:
        assert "Traceback" not in errors, errors
    return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]


def records_in(folder: Path) -> dict[str, Record]:
    return {path.name: read_record(path) for path in sorted(folder.rglob("*.json"))}


def content(record: Record) -> dict[str, object]:
    """A record without when and where it was made."""
    return record.model_dump(exclude={"seconds", "model_seconds", "created", "environment"})


def by_one(start: Start, folder: Path, *words: str) -> dict[str, Record]:
    """The records that one process makes by the same command."""
    (one,) = finish(start(folder, *words, "--out", str(folder / "one"), world=1))
    assert one[0] == 0, one[2]
    return records_in(folder / "one")


def assert_same(found: dict[str, Record], expected: dict[str, Record]) -> None:
    assert found.keys() == expected.keys()
    for name, record in found.items():
        assert record.status == "ok"
        assert content(record) == content(expected[name])


@pytest.mark.parametrize(
    "task", ["digits/digit", pytest.param("digits/retrieval", marks=pytest.mark.slow)]
)
def test_two_processes_make_the_records_of_one(start, tmp_path, task):
    suite = write_suite(tmp_path, "both", [task], ["pgd-1", "apgd-pair"], 10)
    first, second = finish(start(tmp_path, suite, *TINY, "--batch-size", "2"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "clean" in first[1]
    assert second[1:] == ("", "")
    two, one = records_in(tmp_path / "runs"), by_one(start, tmp_path, suite, *TINY)
    assert len(two) == 2
    assert_same(two, one)
    assert {record.environment.processes for record in two.values()} == {2}
    assert {record.environment.processes for record in one.values()} == {None}
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.slow
def test_an_error_in_one_process_is_the_error_of_the_record(start, tmp_path):
    suite = write_suite(tmp_path, "long", ["digits/digit"], ["pgd-20"], 64)
    # The reference's attacks: theirs are small batches, one after the other.
    words = [suite, "--model", "doubles:slow", "--batch-size", "4", "--engine", "reference"]
    # The first would need a minute for its share.
    first, second = finish(start(tmp_path, *words, FAILS="1", NAP="0.1"))
    assert first[0] == second[0] == 2
    assert "mmtard-bench: RuntimeError: out of memory\n" in first[2]
    assert second[1:] == ("", "")
    (record,) = records_in(tmp_path / "runs").values()
    assert (record.status, record.error) == ("error", "RuntimeError: out of memory")
    kept = settled_in(tmp_path)
    assert 4 <= len(kept) < 32
    (again,) = finish(start(tmp_path, *words, world=1))
    assert again[0] == 0
    (record,) = records_in(tmp_path / "runs").values()
    assert record.status == "ok"


def test_what_one_process_lacks_is_said_once(start, tmp_path):
    suite = write_suite(tmp_path, "short", ["digits/digit"], ["pgd-1"], 4)
    first, second = finish(start(tmp_path, suite, "--model", "doubles:picky"))
    assert first == (2, "", "mmtard-bench: Process 2 does not find its weights.\n")
    assert second == (2, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("attack", "engine", "size"),
    [("pgd-20", "reference", "8"), ("apgd-pair", "reference", "8"), ("apgd-pair", "fast", "1")],
)
def test_killed_and_resumed_by_any_number(start, tmp_path, victim, attack, engine, size):
    suite = write_suite(tmp_path, "killed", ["digits/digit"], ["pgd-1", attack], 48)
    words = [suite, "--model", "doubles:slow", "--batch-size", size, "--engine", engine]
    processes = start(tmp_path, *words, NAP="0.02")
    for number, process in enumerate(processes, 1):
        wait_for(f"*{attack}*.partial-{number}of2", tmp_path / "runs", process, seconds=240)
    processes[victim].kill()
    ended = finish(processes)
    assert ended[victim][0] == -signal.SIGKILL
    status, _, errors = ended[1 - victim]
    assert status == 3
    # torch's own warnings may stand before it.
    assert errors.endswith(
        "mmtard-bench: Another process of this run ended, so this one stops. Finished records and "
        "samples are kept. To resume, run the same command, with any number of processes.\n"
    )
    (finished,) = (tmp_path / "runs").rglob("*.json")
    before, kept = finished.stat().st_mtime_ns, settled_in(tmp_path)
    assert (8 if engine == "reference" else 1) <= len(kept) == len(set(kept)) < 48

    # Two go on, and are killed together; then one finishes with what five processes left.
    processes = start(tmp_path, *words, NAP="0.02")
    wait_for_more(tmp_path, kept, processes)
    for process in processes:
        process.kill()
    finish(processes)
    more = settled_in(tmp_path)
    assert set(kept) < set(more)
    assert len(more) == len(set(more))
    processes = start(tmp_path, *words, world=3, NAP="0.02")
    wait_for_more(tmp_path, more, processes)
    for process in processes:
        process.kill()
    finish(processes)
    (last,) = finish(start(tmp_path, *words, world=1))
    assert last[0] == 0, last
    assert finished.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("*.partial*"))
    assert_same(records_in(tmp_path / "runs"), by_one(start, tmp_path, *words))


@pytest.mark.slow
def test_machines_need_no_common_disk(start, tmp_path):
    suite = write_suite(tmp_path, "apart", ["digits/digit"], ["pgd-20"], 48)
    words = [str(tmp_path / suite), "--model", "doubles:slow", "--batch-size", "4"]
    disks = [tmp_path / "a", tmp_path / "b"]
    for disk in disks:
        disk.mkdir()
        (disk / "doubles.py").write_text(MODEL)
    processes = start(disks, *words, NAP="0.02")
    for disk, process in zip(disks, processes, strict=True):
        wait_for("*.partial-?of2", disk, process, seconds=240)
    processes[0].kill()
    finish(processes)
    kept = settled_in(tmp_path)
    again = start(disks, *words, NAP="0.02")
    wait_for_more(tmp_path, kept, again)
    again[1].kill()
    finish(again)
    more = settled_in(tmp_path)
    assert set(kept) < set(more)
    assert len(more) == len(set(more))
    first, second = finish(start(disks, *words))
    assert first[0] == second[0] == 0
    assert not list(tmp_path.rglob("*.partial*"))
    assert_same(records_in(disks[0]), by_one(start, tmp_path, *words))
    assert not records_in(disks[1])


def test_an_interruption_is_said_once(start, tmp_path):
    suite = write_suite(tmp_path, "stopped", ["digits/digit"], ["pgd-20"], 64)
    processes = start(tmp_path, suite, "--model", "doubles:slow", "--batch-size", "4", NAP="0.05")
    wait_for("*.partial-2of2", tmp_path / "runs", processes[1], seconds=240)
    for process in processes:  # as a terminal does
        process.send_signal(signal.SIGINT)
    first, second = finish(processes)
    assert first[0] == second[0] == 130
    assert first[2].startswith("mmtard-bench: Stopped.")
    assert second[1:] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_under_torchrun_ends_as_one_and_resumes(torchrun, start, tmp_path, how):
    suite = write_suite(tmp_path, "launched", ["digits/digit"], ["pgd-20"], 48)
    words = [suite, "--model", "doubles:slow", "--batch-size", "4"]
    launcher = torchrun(*words, NAP="0.05")
    wait_for("*.partial-2of2", tmp_path / "runs", launcher, seconds=240)
    if how == signal.SIGKILL:
        os.kill(int((tmp_path / "pid-1").read_text()), how)
    else:
        launcher.send_signal(how)
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("mmtard-bench:")]
    assert [line[:22] for line in said] == ["mmtard-bench: Stopped."] * (how == signal.SIGINT)
    kept = settled_in(tmp_path)
    again = torchrun(*words, NAP="0.05")
    wait_for_more(tmp_path, kept, [again])
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert_same(records_in(tmp_path / "runs"), by_one(start, tmp_path, *words))


def talk() -> None:
    """What two processes say to each other, and what each of them hears."""
    with joined() as here:
        assert list(here.share(range(5))) == [[0, 2, 4], [1, 3]][here.rank]
        assert here.gather(str(here.rank), str) == ["0", "1"]
        large = 3_000_000  # more than a connection holds
        texts = here.gather("x" * (large + here.rank), str)
        assert [*map(len, texts)] == [large, large + 1]
        assert here.lead(lambda: [here.rank], list[int]) == [0]
        assert here.agree(lambda: here.rank) == here.rank
        for error, told in (
            (StorageError("The disk is full."), StorageError("The disk is full.")),
            (KeyError("x"), InputError("KeyError: 'x'")),
        ):
            expected = error if here.rank == 1 else told
            with pytest.raises(type(expected)) as caught:
                here.agree(partial(fail if here.rank == 1 else wait_for_the_end, here, error))
            assert str(caught.value) == str(expected)
        assert not here.stopping  # none failed since
        if here.rank == 1:
            here.tell(7, 3)
        else:
            wait_until(lambda: here.elsewhere() == (7, 3))
        here.gather(0, int)
        assert here.elsewhere() == (0, 0)


def fail(_: Processes, error: Exception) -> None:
    raise error


def wait_for_the_end(here: Processes, _: Exception) -> None:
    wait_until(lambda: here.stopping)


def test_processes_talk(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = [CONTEXT.Process(target=as_rank, args=(rank, dict(os.environ))) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    assert [process.exitcode for process in both] == [0, 0]


def as_rank(rank: int, env: dict[str, str]) -> None:
    os.environ.update(env, RANK=str(rank))
    talk()


def test_one_process_talks_to_itself():
    assert list(ALONE.share(range(3))) == [0, 1, 2]
    assert ALONE.gather(1, int) == [1]
    assert ALONE.elsewhere() == (0, 0)
    assert not ALONE.stopping


def wait_until(true):
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True


def test_the_environment_is_checked(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with joined() as processes:
        assert processes is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("x", "RANK is 'x'"), ("2", "RANK is 2"), ("0", "MASTER_ADDR")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError, match=said), joined():
            pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with joined() as processes:
        assert processes is ALONE


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert [str(find_device("auto", place)) for place in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(find_device("auto")) == "cuda"
    assert str(find_device("cpu", 1)) == "cpu"


def settled_in(folder: Path) -> list[str]:
    """The samples in all partial files, as they were written."""
    lines = [line for path in folder.rglob("*.partial*") for line in path.read_text().splitlines()]
    return [sample["id"] for line in lines for sample in json.loads(line)["samples"]]


def wait_for_more(
    folder: Path, kept: list[str], running: Sequence[Forked | subprocess.Popen[str]]
) -> None:
    def more() -> bool:
        assert all(process.poll() is None for process in running)
        return len(settled_in(folder)) > len(kept)

    wait_until(more)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_workers_of_a_torchrun_that_is_killed_stop_and_resume(torchrun, start, tmp_path, processes):
    suite = write_suite(tmp_path, "orphaned", ["digits/digit"], ["pgd-20"], 48)
    words = [suite, "--model", "doubles:slow", "--batch-size", "4"]
    launcher = torchrun(*words, processes=processes, NAP="0.5")
    wait_for("*.partial*", tmp_path / "runs", launcher, seconds=240)
    launcher.kill()
    _, errors = launcher.communicate(timeout=60)  # which the workers hold open until they end
    assert "mmtard-bench: Stopped." in errors
    kept = settled_in(tmp_path)
    again = torchrun(*words, NAP="0")
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert 0 < len(kept) < 48
    assert_same(records_in(tmp_path / "runs"), by_one(start, tmp_path, *words))
