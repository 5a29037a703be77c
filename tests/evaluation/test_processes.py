"""Several processes: the record of one, whatever ends one of them, and how it goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mmtard_bench as mb
from mmtard_bench.attacks.base import Engine, EngineName
from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.evaluation import links
from mmtard_bench.evaluation.device import Resources, find_device
from mmtard_bench.evaluation.links import meet
from mmtard_bench.evaluation.processes import ALONE, Launcher, Processes, ProcessLost, joined
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.evaluation.run import run_model
from mmtard_bench.records.files import read_record
from mmtard_bench.records.schema import Record
from mmtard_bench.tasks.suites import load_suite
from mmtard_bench.train.session import Interruption
from tests.conftest import REPOSITORY, wait_for
from tests.forked import Forked

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


def by_one(folder: Path, suite: str, engine: EngineName = "fast") -> dict[str, Record]:
    list(
        run_model(
            mb.load_model("tiny-clip"),
            load_suite(str(folder / suite)),
            Resources(torch.device("cpu"), batch_size=64),
            out=folder / "one",
            progress=RunProgress(Console(quiet=True)),
            engine=Engine(engine),
        )
    )
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
    two, one = records_in(tmp_path / "runs"), by_one(tmp_path, suite)
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
def test_killed_and_gone_on_with_by_any_number(start, tmp_path, victim, attack, engine, size):
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
    assert re.fullmatch(
        rf"mmtard-bench: Process {victim + 1} of 2 ended, so all stop. Finished records and "
        r"samples are kept; the same command, .* goes on from there.\n",
        errors,
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
    assert_same(records_in(tmp_path / "runs"), by_one(tmp_path, suite, engine))


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
    assert_same(records_in(disks[0]), by_one(tmp_path, suite))
    assert not records_in(disks[1])


def test_an_interruption_of_one_process_is_one_of_all(start, tmp_path):
    suite = write_suite(tmp_path, "stopped", ["digits/digit"], ["pgd-20"], 64)
    processes = start(tmp_path, suite, "--model", "doubles:slow", "--batch-size", "4", NAP="0.05")
    wait_for("*.partial-2of2", tmp_path / "runs", processes[1], seconds=240)
    processes[1].send_signal(signal.SIGINT)
    first, second = finish(processes)
    assert first[0] == second[0] == 130
    assert first[2].startswith("mmtard-bench: Stopped.")
    assert second[1:] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_torchrun_ends_all_with_a_sentence_and_goes_on(torchrun, tmp_path, how):
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
    expected = "Process 2 of 2 ended" if how == signal.SIGKILL else "Stopped."
    assert len(said) == 1
    assert expected in said[0]
    kept = settled_in(tmp_path)
    again = torchrun(*words, NAP="0.05")
    wait_for_more(tmp_path, kept, [again])
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert_same(records_in(tmp_path / "runs"), by_one(tmp_path, suite))


@pytest.fixture
def pair():
    """Two processes that have met, in this one, and a way to let both do something."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda rank: meet(rank, 2, "127.0.0.1", port), (0, 1))
        processes = [Processes(rank, 2, found) for rank, found in enumerate(both)]
        for each in processes:
            each.listen()

        def together(work):
            return list(pool.map(lambda each: outcome(work, each), processes))

        yield together
        list(pool.map(Processes.finish, processes))
    for number, handler in before.items():
        signal.signal(number, handler)


def outcome(work, each):
    try:
        return work(each)
    except Exception as error:
        return error


def test_values_are_gathered_and_work_is_shared(pair):
    assert pair(lambda each: list(each.share(range(5)))) == [[0, 2, 4], [1, 3]]
    assert pair(lambda each: each.gather(str(each.rank), str)) == [["0", "1"]] * 2
    large = 3_000_000  # more than a connection holds
    assert pair(lambda each: [*map(len, each.gather("x" * large, str))]) == [[large] * 2] * 2
    assert pair(lambda each: each.lead(lambda: [each.rank], list[int])) == [[0], [0]]
    assert pair(lambda each: each.agree(lambda: each.rank)) == [0, 1]
    assert list(ALONE.share(range(3))) == [0, 1, 2]
    assert ALONE.gather(1, int) == [1]


def test_an_error_is_raised_everywhere(pair):
    def work(each):
        if each.rank == 1:
            raise StorageError("The disk is full.") if each.disk else KeyError("x")
        return wait_until(lambda: each.stopping)

    cases = [(True, StorageError, "The disk is full."), (False, InputError, "KeyError: 'x'")]
    for disk, kind, text in cases:

        def agreed(each, disk=disk):
            each.disk = disk
            return each.agree(lambda: work(each))

        first, second = pair(agreed)
        assert type(first) is kind
        assert str(first) == text
        assert type(second) is (StorageError if disk else KeyError)
        assert pair(lambda each: each.stopping) == [False, False]
    first, second = pair(lambda each: each.lead(lambda: 1 / 0, int))
    assert isinstance(first, ZeroDivisionError)
    assert str(second) == "ZeroDivisionError: division by zero"


def test_the_first_process_hears_how_far_the_others_are(pair):
    pair(lambda each: each.tell(7, 3))
    assert pair(lambda each: each.rank == 1 or wait_until(lambda: each.elsewhere() == (7, 3)))
    pair(lambda each: each.gather(0, int))
    assert pair(Processes.elsewhere) == [(0, 0), (0, 0)]


def wait_until(true):
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True


def test_strangers_are_turned_away_and_the_patient_give_up(monkeypatch):
    monkeypatch.setattr(links, "PATIENCE", 3.0)
    strangers: list[socket.socket] = []
    monkeypatch.setattr(links.secrets, "token_hex", lambda: "a" * 64)
    create = socket.create_server

    def knock(*args, **options):
        server = create(*args, **options)
        for greeting in (b'["wrong", 1]\n', b"no JSON\n", b'["' + b"a" * 64 + b'", 9]\n'):
            stranger = socket.create_connection(("127.0.0.1", server.getsockname()[1]))
            stranger.sendall(greeting)
            strangers.append(stranger)
        return server

    monkeypatch.setattr(socket, "create_server", knock)
    with pytest.raises(TimeoutError, match="1 of 2 came within 3 s"):
        meet(0, 2, "127.0.0.1", free_port())
    assert len(strangers) == 3
    for stranger in strangers:
        # Hung up on, not left to wait.
        assert stranger.recv(1) == b""
        stranger.close()


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


@pytest.fixture
def launched(monkeypatch) -> Iterator[Callable[[], None]]:
    """As if torchrun had started this process; the call is its end."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield lambda: monkeypatch.setattr(os, "getppid", lambda: 1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_worker_whose_launcher_is_gone_stops(launched):
    with pytest.raises(ProcessLost, match=r"The launcher ended, so all stop\. Finished"), joined():
        launched()
        time.sleep(20)


def test_training_stops_after_the_step_in_which_its_launcher_ends(launched):
    with Interruption(Launcher()) as interruption:
        assert not interruption.asked
        launched()
        assert interruption.asked


def test_a_shell_that_started_a_run_may_end(launched, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    launcher = Launcher()
    launched()
    assert not launcher.ended


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_workers_of_a_torchrun_that_is_killed_stop_and_go_on(torchrun, tmp_path, processes):
    suite = write_suite(tmp_path, "orphaned", ["digits/digit"], ["pgd-20"], 48)
    words = [suite, "--model", "doubles:slow", "--batch-size", "4"]
    launcher = torchrun(*words, processes=processes, NAP="0.5")
    wait_for("*.partial*", tmp_path / "runs", launcher, seconds=240)
    launcher.kill()
    _, errors = launcher.communicate(timeout=60)  # which the workers hold open until they end
    assert "mmtard-bench: The launcher ended, so all stop. Finished records and" in errors
    kept = settled_in(tmp_path)
    again = torchrun(*words, NAP="0")
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert 0 < len(kept) < 48
    assert_same(records_in(tmp_path / "runs"), by_one(tmp_path, suite))
