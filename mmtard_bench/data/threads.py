"""Decode samples ahead in threads: Pillow releases Python's lock while it decodes."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

AHEAD = 64
"""How many items ``in_order`` computes ahead."""


def worker_count(given: int | None) -> int:
    """The number of decoding threads: the given one; default: from the number of cores."""
    return min(os.cpu_count() or 1, 8) if given is None else given


def in_chunks(
    chunks: Sequence[Sequence[S]], work: Callable[[S], T], *, workers: int
) -> Generator[tuple[Sequence[S], list[T]], None, None]:
    """Yield each chunk with the results of ``work``, while threads work on the next chunk.

    At most two chunks are in memory. With 0 workers, each chunk is computed when it is needed. An
    exception of ``work`` is raised at its chunk.
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
        # Do not wait for threads: after Ctrl-C nobody needs their images.
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(items: Iterable[S], work: Callable[[S], T], *, workers: int) -> Iterator[T]:
    """Yield the results of ``work`` in the order of the items, a few of them computed ahead."""
    every = list(items)
    chunks = [every[i : i + AHEAD] for i in range(0, len(every), AHEAD)]
    for _, results in in_chunks(chunks, work, workers=workers):
        yield from results
