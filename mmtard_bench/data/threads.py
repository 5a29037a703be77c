"""Work on samples in threads, ahead of where it is needed: Pillow decodes without Python's lock."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

AHEAD = 64
"""Items that ``in_order`` has in work, or done, before they are asked for."""


def worker_count(given: int | None) -> int:
    """Threads to decode with: as given, or what this machine can spare."""
    return min(os.cpu_count() or 1, 8) if given is None else given


def in_chunks(
    chunks: Sequence[Sequence[S]], work: Callable[[S], T], *, workers: int
) -> Generator[tuple[Sequence[S], list[T]], None, None]:
    """Each chunk with what ``work`` makes of its items; the next one is in work meanwhile.

    Two chunks are in memory at most. With 0 workers, everything is done when it is asked for.
    What ``work`` raises is raised where its chunk would come.
    """
    if workers == 0:
        for chunk in chunks:
            yield chunk, [work(item) for item in chunk]
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        coming: list[Future[T]] = []
        for number, chunk in enumerate(chunks):
            now = coming or [pool.submit(work, item) for item in chunk]
            done = [future.result() for future in now]
            following = chunks[number + 1] if number + 1 < len(chunks) else []
            coming = [pool.submit(work, item) for item in following]
            yield chunk, done
    finally:
        # Not waiting: whoever interrupts should not wait for images that nobody wants any more.
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(items: Iterable[S], work: Callable[[S], T], *, workers: int) -> Iterator[T]:
    """What ``work`` makes of each item, in their order, a few of them ahead."""
    every = list(items)
    chunks = [every[i : i + AHEAD] for i in range(0, len(every), AHEAD)]
    for _, results in in_chunks(chunks, work, workers=workers):
        yield from results
