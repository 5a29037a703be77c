"""Command lines in processes that begin with everything imported: as many as a test likes."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mmtard_bench.cli", "mmtard_bench.evaluation.run", __name__])


def run_command(
    words: list[str],
    folder: str,
    env: dict[str, str],
    said: tuple[str, str],
    before: Callable[[], None],
) -> None:
    """In the new process: run ``mmtard-bench`` as if it had been started there."""
    from mmtard_bench.cli import main

    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    os.chdir(folder)
    before()
    sys.exit(main(words))


class Forked:
    """As much of ``subprocess.Popen`` as tests need; ``before`` is called in the new process."""

    def __init__(
        self,
        words: list[str],
        folder: Path,
        env: dict[str, str],
        said: Path,
        before: Callable[[], None] = int,
    ) -> None:
        said.mkdir(parents=True)
        self.said = said / "out", said / "err"
        paths = str(self.said[0]), str(self.said[1])
        self.process: ForkServerProcess = CONTEXT.Process(
            target=run_command, args=(words, str(folder), env, paths, before)
        )
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("mmtard-bench", timeout or 0)
        out, err = (path.read_text() for path in self.said)
        return out, err
