"""Several processes that work on one run: how they share the samples and exchange results.

A launcher starts them. Torchrun and accelerate launch set RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; with srun the user sets them. The processes exchange JSON over torch.distributed
(gloo), never pickles. If one process ends, the launcher ends the others.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import TypeAdapter

from mmtard_bench.errors import InputError, StorageError, reason

if TYPE_CHECKING:  # torch is slow to import, and one process alone does not need it here
    from torch.distributed.distributed_c10d import Store, Work

T = TypeVar("T")

KEPT = (
    "Finished records and samples are kept. To resume, run the same command, with any number of "
    "processes."
)
_MEETING = timedelta(minutes=10)
_WAIT = timedelta(days=30)
"""For the others: one process may attack for days while another has finished its share."""


class ProcessLost(BaseException):
    """The run cannot continue, because one of its processes ended.

    It derives from BaseException, as KeyboardInterrupt does: no model and no attack has failed.
    """


@dataclass(frozen=True)
class Failure:
    """An exception as one process reports it to the others."""

    text: str
    storage: bool

    def error(self) -> InputError:
        """The exception that the other processes raise."""
        return StorageError(self.text) if self.storage else InputError(self.text)


class Processes:
    """The processes of a run, from the view of one of them; default: a single process.

    Every process must call ``gather``, ``agree`` and ``lead`` in the same order. All methods raise
    ProcessLost if another process has ended.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: "Store | None" = None) -> None:
        self.rank, self.world = rank, world
        self._store = store
        self._round = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes records."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process works on."""
        return items[self.rank :: self.world]

    def gather(self, value: T, kind: Any) -> list[T]:
        """The values of all processes, by rank; ``kind`` is their type, for pydantic."""
        if self._store is None:
            return [value]
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        self._round += 1
        with _others():
            return [*map(adapter.validate_json, _exchanged(adapter.dump_json(value), self.world))]

    def agree(self, work: Callable[[], T]) -> T:
        """Call ``work`` on every process and return its result here, once all have finished.

        If it raises on one process, this method raises on all: its own exception where it failed,
        elsewhere an InputError with the first reason. ``stopping`` reports a failure earlier.
        """
        if self._store is None:
            return work()
        result, failed = None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must not wait for ever
            failed = error
            self._set("failed", "")
        said = Failure(reason(failed), isinstance(failed, StorageError)) if failed else None
        failures = self.gather(said, Failure | None)
        if failed is not None:
            raise failed
        for failure in failures:
            if failure is not None:
                raise failure.error()
        return cast("T", result)

    def lead(self, work: Callable[[], T], kind: Any) -> T:
        """Call ``work`` on the first process; all return its result. Raises as ``agree``."""
        value = self.agree(lambda: work() if self.first else None)
        return cast("T", self.gather(value, kind | None)[0])

    @property
    def stopping(self) -> bool:
        """Whether the work in ``agree`` failed on another process, so that this one may stop."""
        return self._get("failed") is not None

    def tell(self, settled: int, robust: int) -> None:
        """Tell the first process how many samples of this share are settled and how many robust."""
        self._set(f"progress/{self.rank}", f"{settled} {robust}")

    def elsewhere(self) -> tuple[int, int]:
        """The number of settled and of robust samples in the shares of the other processes."""
        told = (self._get(f"progress/{rank}") for rank in range(self.world) if rank != self.rank)
        counts = [[*map(int, text.split())] for text in told if text is not None]
        return sum(settled for settled, _ in counts), sum(robust for _, robust in counts)

    def _set(self, name: str, text: str) -> None:
        if self._store is not None:
            with _others():
                self._store.set(f"{self._round}/{name}", text)

    def _get(self, name: str) -> str | None:
        key = f"{self._round}/{name}"
        if self._store is None:
            return None
        with _others():
            return self._store.get(key).decode() if self._store.check([key]) else None


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Connect the processes that a launcher started; without a launcher, a single process.

    Raises InputError if the launcher's variables are not valid, and ProcessLost if the processes
    cannot connect.
    """
    end_with_launcher()
    try:
        processes = _meet()
        yield processes
        processes.gather(None, None)  # the first one holds the store: it ends last
    except KeyboardInterrupt:
        if "RANK" in os.environ:  # a terminal and a launcher both pass Ctrl-C on: once is enough
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    if processes.world > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def _meet() -> Processes:
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if "RANK" not in os.environ or world == 1:
        return ALONE
    if rank >= world:
        raise InputError(f"RANK is {rank}, but WORLD_SIZE is {world}; a launcher sets both.")
    if "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"WORLD_SIZE says that there are {world} processes, but MASTER_ADDR does not say where "
            "they meet. Start them by torchrun or accelerate launch, or unset RANK for one alone."
        )
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=_MEETING))
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(world)], _MEETING)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_WAIT)
    except (OSError, RuntimeError, ValueError) as error:
        raise ProcessLost(
            f"Process {rank + 1} of {world} did not find the others: {reason(error)}."
        ) from error
    return Processes(rank, world, store)


def end_with_launcher() -> None:
    """Let the system interrupt this process (SIGINT) if its torchrun is killed. Linux only."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch import multiprocessing

        multiprocessing._prctl_pr_set_pdeathsig(signal.SIGINT)  # type: ignore[attr-defined]


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return _number("LOCAL_RANK", _number("RANK", 0))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"The environment variable {name} is {text!r}, not a whole number.")
    return int(text)


@contextmanager
def _others() -> Iterator[None]:
    """Communicate with the other processes. A failure means that one of them ended."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"Another process of this run ended, so this one stops. {KEPT}"
        ) from error


def _exchanged(own: bytes, world: int) -> list[bytes]:
    import torch
    import torch.distributed as dist

    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    _await(dist.all_gather(sizes, torch.tensor([len(own)]), async_op=True))
    padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in range(world)]
    _await(dist.all_gather(parts, padded, async_op=True))
    return [bytes(part[: int(size)].tolist()) for part, size in zip(parts, sizes, strict=True)]


def _await(work: "Work") -> None:
    """Wait in Python, because ``Work.wait`` blocks Ctrl-C."""
    while not work.is_completed():
        time.sleep(0.02)
    work.wait()
