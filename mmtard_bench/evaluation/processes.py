"""Several processes that work on one run: who does what, and what they tell each other.

A launcher (torchrun, accelerate launch, srun) starts them, and says by RANK and WORLD_SIZE who
they are. They meet at torch's key-value store at MASTER_ADDR:MASTER_PORT; from there on each holds
one connection to the first, over which JSON goes and nothing that could be executed.

Not the collectives of torch.distributed: those wait where no signal is heard, and notice that a
process died only once they wait for it. A connection that closes is heard of at once, in the
middle of an attack too, and whoever waits may do so for days.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

from mmtard_bench.errors import InputError, StorageError, reason
from mmtard_bench.evaluation.links import Link, meet

T = TypeVar("T")

KEPT = (
    "Finished records and samples are kept; the same command, with any number of processes, goes "
    "on from there."
)


class ProcessLost(BaseException):
    """The run cannot go on: a process of it ended. Without a message if another one says it.

    No Exception, as KeyboardInterrupt is none: it is no failure of a model or of an attack.
    """


@dataclass(frozen=True)
class Failure:
    """What another process needs to know of an exception."""

    text: str
    storage: bool

    def error(self) -> InputError:
        """The exception to raise elsewhere."""
        return StorageError(self.text) if self.storage else InputError(self.text)


class Launcher:
    """The torchrun that started this process; where it is killed by -9, nobody ends its workers.

    Other parents are not asked: a shell may end before what it started.
    """

    def __init__(self) -> None:
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def ended(self) -> bool:
        """Whether it was there and is gone."""
        return self._parent not in (None, os.getppid())


class Processes:
    """The processes of a run, as one of them sees them; without links it is alone.

    Every process must come to the same calls of ``gather``, ``agree`` and ``lead`` in the same
    order. All of them may raise ProcessLost at any moment, in the main thread, by a signal.
    """

    def __init__(self, rank: int = 0, world: int = 1, links: dict[int, Link] | None = None) -> None:
        self.rank, self.world = rank, world
        self._links = links or {}
        self._round = 0
        self._failed = -1
        self._settled = dict.fromkeys(self._links, (-1, 0, 0))
        self._cause: BaseException | None = None
        self._over = False

    @property
    def first(self) -> bool:
        """Whether this process speaks, and writes records, for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that this process works on."""
        return items[self.rank :: self.world]

    def gather(self, value: T, kind: Any) -> list[T]:
        """The values of all processes, by rank; ``kind`` is their type, for pydantic."""
        if not self._links:
            return [value]
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        own = adapter.dump_json(value).decode()
        if self.first:
            texts = [own, *(self._receive(self._links[rank]) for rank in range(1, self.world))]
            self._round += 1
            for link in self._links.values():
                link.send("value", texts)
        else:
            self._links[0].send("value", own)
            texts = self._receive(self._links[0])
            self._round += 1
        return [adapter.validate_json(text) for text in texts]

    def agree(self, work: Callable[[], T]) -> T:
        """What ``work`` gives here, once all processes have done it.

        If it raises on any of them, this raises on all: what it raised here, or an InputError
        with the reason of the first that failed. The others learn of it by ``stopping``.
        """
        if not self._links:
            return work()
        result, failed = None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must not wait for ever
            failed = error
            self._fail(self._round)
        said = Failure(reason(failed), isinstance(failed, StorageError)) if failed else None
        failures = self.gather(said, Failure | None)
        if failed is not None:
            raise failed
        for failure in failures:
            if failure is not None:
                raise failure.error()
        return cast("T", result)

    def lead(self, work: Callable[[], T], kind: Any) -> T:
        """What ``work`` gives on the first process, which alone does it; raises as ``agree``."""
        value = self.agree(lambda: work() if self.first else None)
        return cast("T", self.gather(value, kind | None)[0])

    @property
    def stopping(self) -> bool:
        """Whether the work in ``agree`` failed elsewhere, so that the rest of it is in vain."""
        return self._failed == self._round

    def tell(self, settled: int, standing: int) -> None:
        """Tell the first process how far this one's share is: samples settled, and standing."""
        if not self.first:
            self._links[0].send("progress", (self._round, settled, standing))

    def elsewhere(self) -> tuple[int, int]:
        """How far the shares of the others are: samples settled, and standing."""
        told = [counts for turn, *counts in self._settled.values() if turn == self._round]
        return sum(settled for settled, _ in told), sum(standing for _, standing in told)

    def listen(self) -> None:
        """Begin to hear the others; from now on a signal ends this process with a sentence."""
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        threading.Thread(target=self._watch, args=(Launcher(),), daemon=True).start()
        for rank, link in self._links.items():
            threading.Thread(target=self._listen, args=(rank, link), daemon=True).start()

    def finish(self) -> None:
        """Wait until all are finished: launchers stop the others once one has ended."""
        self._over = True
        self.gather(None, None)

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process ends, and why."""
        self._over = True
        why = {KeyboardInterrupt: "interrupted", ProcessLost: "lost"}.get(type(error))
        if why is None:  # a bug: they are told by the connection that closes
            return

        def tell() -> None:
            for link in self._links.values():
                link.send("stopped", why)

        # Not for long: a process that hangs does not read.
        farewell = threading.Thread(target=tell, daemon=True)
        farewell.start()
        farewell.join(2)

    def _receive(self, link: Link) -> Any:
        value = link.values.get()
        if value is None:
            raise self._cause or ProcessLost()
        return value

    def _fail(self, turn: int, but: int | None = None) -> None:
        self._failed = turn
        for rank, link in self._links.items():
            if rank != but:
                link.send("failed", turn)

    def _listen(self, rank: int, link: Link) -> None:
        with suppress(OSError, ValueError):
            for kind, body in link.messages():
                if kind == "value":
                    link.values.put(body)
                elif kind == "progress":
                    self._settled[rank] = tuple(body)
                elif kind == "failed":
                    if self.first:
                        self._fail(body, but=rank)
                    self._failed = body
                else:
                    self._end(KeyboardInterrupt() if body == "interrupted" else ProcessLost())
        self._end(ProcessLost(f"Process {rank + 1} of {self.world} ended, so all stop. {KEPT}"))
        link.values.put(None)

    def _watch(self, launcher: Launcher) -> None:
        while not launcher.ended:
            time.sleep(1)
        # The first one says it, and others only where it is another launcher's.
        time.sleep(0 if self.first else 3)
        self._end(ProcessLost(f"The launcher ended, so all stop. {KEPT}"))

    def _end(self, cause: BaseException) -> None:
        """Interrupt the main thread, whatever it is at."""
        if self._cause is None:
            self._cause = cause
            if not self._over:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _stop(self, number: int, _: object) -> None:
        # Launchers and processes all pass a signal on: the first one counts.
        if self._over:
            return
        self._over = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        told = f"The launcher told process {self.rank + 1} of {self.world} to end. {KEPT}"
        raise self._cause or ProcessLost(told if self.first else "")


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that a launcher started, or this one alone where there was none.

    Raises InputError if the environment says nothing sensible of them, ProcessLost (which may come
    at any moment in here) if they do not find each other.
    """
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if "RANK" not in os.environ or (world == 1 and "TORCHELASTIC_RUN_ID" not in os.environ):
        yield ALONE
        return
    if rank >= world:
        raise InputError(f"RANK is {rank}, but WORLD_SIZE is {world}; a launcher sets both.")
    processes = Processes(rank, world, _meet(rank, world) if world > 1 else {})
    processes.listen()
    try:
        yield processes
        processes.finish()
    except BaseException as error:
        processes.leave(error)
        raise


def _meet(rank: int, world: int) -> dict[int, Link]:
    try:
        return meet(rank, world, os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0))
    except KeyError:
        raise InputError(
            f"WORLD_SIZE says that there are {world} processes, but MASTER_ADDR does not say where "
            "they meet. Start them by torchrun or accelerate launch, or unset RANK for one alone."
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # of sockets, of torch's store
        raise ProcessLost(
            f"Process {rank + 1} of {world} did not find the others: {reason(error)}."
        ) from error


def local_rank() -> int:
    """Which of the processes on this machine this is, from 0."""
    return _number("LOCAL_RANK", _number("RANK", 0))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"The environment variable {name} is {text!r}, not a whole number.")
    return int(text)
