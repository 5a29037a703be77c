"""Several processes that work on one run: who does what, and what they tell each other.

A launcher starts them. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who they are: torchrun and
accelerate launch set these variables, for srun the user does. They exchange JSON over
torch.distributed (gloo), never pickles. Where one of them ends, its launcher ends the others.
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

    It is no Exception, as KeyboardInterrupt is none: no model and no attack has failed.
    """


@dataclass(frozen=True)
class Failure:
    """What another process needs to know of an exception."""

    text: str
    storage: bool

    def error(self) -> InputError:
        """The exception to raise elsewhere."""
        return StorageError(self.text) if self.storage else InputError(self.text)


class Processes:
    """The processes of a run, as one of them sees them; by default it is alone.

    Every process must call ``gather``, ``agree`` and ``lead`` in the same order. All methods raise
    ProcessLost where another process has ended.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: "Store | None" = None) -> None:
        self.rank, self.world = rank, world
        self._store = store
        self._round = 0

    @property
    def first(self) -> bool:
        """Whether this process prints and writes records for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that this process works on."""
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
        """What ``work`` returns here, once all processes have done it.

        If it raises on any of them, this raises on all: what it raised here, or an InputError
        with the reason of the first that failed. ``stopping`` tells the others early.
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
        """What ``work`` returns on the first process, which alone does it; raises as ``agree``."""
        value = self.agree(lambda: work() if self.first else None)
        return cast("T", self.gather(value, kind | None)[0])

    @property
    def stopping(self) -> bool:
        """Whether the work in ``agree`` failed elsewhere, so that the rest of it is in vain."""
        return self._get("failed") is not None

    def tell(self, settled: int, robust: int) -> None:
        """Tell the first process how many samples of this one's share are settled, and robust."""
        self._set(f"progress/{self.rank}", f"{settled} {robust}")

    def elsewhere(self) -> tuple[int, int]:
        """How many samples of the others' shares are settled, and how many of them robust."""
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
    """The processes that a launcher started, or this one alone where there was none.

    Raises InputError if the environment says nothing sensible of them, ProcessLost if they do not
    find each other.
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
    """Which of the processes on this machine this is, from 0."""
    return _number("LOCAL_RANK", _number("RANK", 0))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"The environment variable {name} is {text!r}, not a whole number.")
    return int(text)


@contextmanager
def _others() -> Iterator[None]:
    """Talk to the other processes: what fails then is that one of them ended."""
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
    """Wait in Python: in ``Work.wait`` Ctrl-C is not heard."""
    while not work.is_completed():
        time.sleep(0.02)
    work.wait()
