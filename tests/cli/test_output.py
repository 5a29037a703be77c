"""Output that cannot be written: full disks, pipes without a reader, foreign characters."""

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmtard_bench.cli import main
from mmtard_bench.cli.output import OutputLost, guarded_errors, guarded_output
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.records.files import load_records
from tests.conftest import assert_sentence
from tests.leaderboard.test_leaderboard import made

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")


def full() -> io.TextIOWrapper:
    return FULL.open("w")


@contextmanager
def standard(name: str, stream: io.TextIOWrapper) -> Iterator[None]:
    """Let this be standard output or error."""
    with stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, name, stream)
        yield


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


LOST = [
    pytest.param(full, 2, "could not be written: No space left on device", marks=needs_full),
    (pipe_without_reader, 141, "The reader of the output left"),
]


@pytest.mark.parametrize(("lost", "status", "why"), LOST)
def test_a_run_keeps_what_is_finished_and_says_so(lost, status, why, here, tmp_path):
    command = ("run", "quick-v1", "--model", "tiny-clip", "--n", "2", "--batch-size", "2")
    with standard("stdout", lost()):
        done = here(*command)
    assert done.returncode == status
    assert why in done.stderr
    assert "the same command resumes from there" in done.stderr
    assert [record.status for record in load_records(tmp_path / "runs")] == ["ok"]
    assert "pgd-20 linf 8/255: clean 100.0%, robust 0.0% (already there)" in here(*command).stdout


@pytest.mark.parametrize(("lost", "status", "why"), LOST)
def test_a_line_that_is_lost_during_an_attack_is_no_failure_of_the_attack(
    lost, status, why, here, monkeypatch, tmp_path
):
    monkeypatch.setattr(RunProgress, "update", lambda self, _: self.say("so far"))
    with standard("stdout", lost()):
        done = here("run", "quick-v1", "--model", "tiny-clip", "--n", "2", "--batch-size", "2")
    assert (done.returncode, why in done.stderr) == (status, True)
    assert load_records(tmp_path / "runs") == []


@needs_full
def test_commands_that_print_end_as_those_of_unix(here):
    with standard("stdout", pipe_without_reader()):
        done = here("list", "models")
    assert (done.returncode, done.stderr) == (141, "")
    with standard("stdout", full()):
        assert_sentence(here("list", "models"), "could not be written: No space left on device.")


@needs_full
def test_errors_that_nobody_reads_change_no_status(monkeypatch):
    with standard("stderr", full()):
        assert main(["show", "nowhere"]) == 2
        with standard("stdout", full()):
            assert main(["list", "models"]) == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list", "models"]) == 0


def test_characters_that_do_not_fit_are_escaped_and_json_stays_json(tmp_path):
    made("rb", name="süß 🍰").save(tmp_path / "r.json")
    shown = {}
    for encoding in ("ascii", "utf-8"):
        for form in ((), ("--json",)):
            out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            with standard("stdout", out):
                assert main(["show", str(tmp_path), *form]) == 0
                shown[encoding, form] = out.buffer.getvalue().decode(encoding)
    assert r"s\u00fc\u00df \ud83c\udf70 (d" in shown["ascii", ()]
    assert "süß 🍰 (d" in shown["utf-8", ()]
    assert json.loads(shown["ascii", ("--json",)]) == json.loads(shown["utf-8", ("--json",)])


def test_a_path_that_is_no_utf_8_is_said(here):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with standard("stderr", out):
        assert here("show", "n\udcffö").returncode == 2
        assert rb"There is no directory n?\u00f6" in out.buffer.getvalue()


def test_a_line_that_another_thread_loses_ends_the_main_one():
    done = []

    def work():
        print("a line", flush=True)
        done.append(True)

    lost = standard("stdout", pipe_without_reader())
    with lost, guarded_errors(), pytest.raises(OutputLost), guarded_output():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert done == [True]
        print("another")
