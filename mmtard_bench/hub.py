"""Files of hub repositories: a commit resolved once, downloads checked, every failure a sentence.

Everything goes through ``huggingface_hub`` and its cache, which other programs share. That library
checks sizes; here checksums are checked as well, and what fails leaves no trace in the cache.
"""

import errno
import hashlib
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from huggingface_hub import (
    HfFileSystem,
    constants,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from mmtard_bench.errors import InputError, StorageError, first_line
from mmtard_bench.muted import no_logs

T = TypeVar("T")
Kind = Literal["dataset", "model"]

LONGEST_WAIT = 300
"""Seconds that one request may wait in all where the hub limits its rate: its usual window."""

log = logging.getLogger(__name__)
_LISTENERS: list[Callable[[str], None]] = []
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def resolve_commit(spec: str, repository: str, revision: str, *, kind: Kind = "dataset") -> str:
    """The commit that a revision (a branch, a tag, "" for the default branch) names now.

    Where the hub cannot be asked, what it said last time is in the cache. Raises InputError,
    with ``spec`` in it, if there is nothing of the kind.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    folder = run(
        spec,
        # Of no file: what is wanted is the commit, and the reference to it that the cache keeps.
        lambda: snapshot_download(
            repository, repo_type=kind, revision=revision or None, allow_patterns=[]
        ),
    )
    return Path(folder).name


def download(spec: str, repository: str, file: str, commit: str, *, kind: Kind = "dataset") -> Path:
    """A file of a repository, from the cache or downloaded into it and checked.

    Raises InputError if it cannot be had, or is not what the hub's checksum says.
    """
    place = _snapshot(repository, commit, kind) / file
    if not place.exists():
        _tell(f"{repository}: downloading {file}")
        started = time.monotonic()
        run(spec, lambda: hf_hub_download(repository, file, repo_type=kind, revision=commit))
        if _is_damaged(place):
            _forget(place)
            require_sound(spec, [file])
        size, seconds = place.stat().st_size / 1e6, time.monotonic() - started
        _tell(f"{repository}: {file}, {size:.1f} MB in {seconds:.1f} s")
    return place


def look(spec: str, repository: str, file: str, commit: str, work: Callable[[BinaryIO], T]) -> T:
    """What ``work`` makes of a data set's file, of which only what it reads is fetched.

    That is not checked: the hub's checksum is one of the whole file. Raises InputError.
    """

    def read() -> T:
        files = HfFileSystem(endpoint=constants.ENDPOINT)
        place = f"datasets/{repository}@{commit}/{file}"
        # Without a cache, which would read ahead.
        with files.open(place, cache_type="none") as opened:
            return work(opened)

    _tell(f"{repository}: reading in {file}")
    return run(spec, read)


def file_names(spec: str, repository: str, commit: str) -> list[str]:
    """All files of a data set's repository, as the hub lists them. Raises InputError."""
    root = f"datasets/{repository}@{commit}/"
    files = HfFileSystem(endpoint=constants.ENDPOINT)
    return [name.removeprefix(root) for name in run(spec, lambda: files.find(root))]


def cached_files(repository: str, kind: Kind = "dataset") -> set[Path]:
    """All that the cache holds of a repository."""
    return {path for path in _snapshot(repository, "", kind).rglob("*") if path.is_file()}


def first_file(spec: str, repository: str, names: Sequence[str], commit: str) -> Path:
    """The first of these files that a model's repository has. Raises InputError."""
    absent: list[InputError] = []
    for name in names:
        try:
            return download(spec, repository, name, commit, kind="model")
        except InputError as error:
            # Not there or, offline, not in the cache: perhaps the next.
            if not any(isinstance(cause, EntryNotFoundError) for cause in _causes(error)):
                raise
            absent.append(error)
    raise absent[0]


def folder(spec: str, repository: str, revision: str, patterns: Sequence[str]) -> Path:
    """A folder with the files of a model's repository that match, checked. Raises InputError."""
    return checked(
        spec,
        repository,
        lambda: snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns)
        ),
    )


def checked(spec: str, repository: str, fetch: Callable[[], str]) -> Path:
    """The path that a library's ``fetch`` of files of a model's repository returns.

    What that brought is checked: the libraries do not. Raises InputError.
    """
    known = cached_files(repository, "model")
    found = run(spec, fetch)
    require_sound(spec, check_cache(repository, "model", known=known)[1])
    return Path(found)


def require_sound(spec: str, damaged: Sequence[str]) -> None:
    """Raise InputError if files were found to be damaged, and taken out of the cache."""
    if damaged:
        raise InputError(
            f"{spec}: what arrived as {damaged[0]} does not have the checksum that the hub "
            "states. It was taken out of the cache again; run the same command again."
        )


def check_cache(
    repository: str, kind: Kind = "dataset", *, known: Collection[Path] = ()
) -> tuple[int, list[str]]:
    """Check what the cache holds of a repository: how many files, and which were removed.

    A file that is not what the hub's checksum says is removed, so that it is downloaded again.
    Those that are ``known`` are left alone.
    """
    links = sorted(cached_files(repository, kind).difference(known))
    damaged = [path for path in links if _is_damaged(path)]
    for path in damaged:
        _forget(path)
    snapshots = _snapshot(repository, "", kind)
    names = [path.relative_to(snapshots).as_posix().partition("/")[2] for path in damaged]
    return len(links) - len(damaged), names


@contextmanager
def told(say: Callable[[str], None]) -> Iterator[None]:
    """Have ``say`` called with a line for every download, and for waiting."""
    _LISTENERS.append(say)
    try:
        yield
    finally:
        _LISTENERS.remove(say)


def _tell(line: str) -> None:
    # Not by a logger alone: an application may have switched that off.
    log.info(line)
    for say in _LISTENERS:
        say(line)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of hub and model libraries; what matters in them raises.

    The bars of downloads stay on a terminal: gigabytes in silence would look like a crash.
    """
    bars = not are_progress_bars_disabled()
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with no_logs, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            enable_progress_bars()


def run(spec: str, work: Callable[[], T]) -> T:
    """Do something with the hub's clients, patiently and quietly. Raises InputError."""
    waited = 0
    while True:
        try:
            with quiet(), _rate_limits_raised():
                return work()
        except Exception as error:  # the clients' errors have no common base
            limit = next((e for e in _causes(error) if isinstance(e, _RateLimitError)), None)
            if limit is None or waited + limit.seconds > LONGEST_WAIT:
                raise refusal(spec, error) from error
            _tell(f"{spec}: the hub asks to wait for {limit.seconds} s")
            time.sleep(limit.seconds)
            waited += limit.seconds


def refusal(spec: str, error: BaseException) -> InputError:
    """The error for something with the hub that failed: what happened, and what to do."""
    unwritten = cache_failure(spec, constants.HF_HUB_CACHE, error)
    return unwritten or InputError(f"{spec}: {_explain(list(_causes(error)))}")


def cache_failure(spec: str, cache: str | Path, error: BaseException) -> StorageError | None:
    """The error for a library that could not write to its cache; None if it failed otherwise."""
    full = _full_disk(_causes(error), Path(cache))
    if full is None:
        return None
    return StorageError(
        f"{spec}: the cache {cache} could not be written: {full.strerror or full}. What is "
        "whole in it is kept; free space, or set HF_HOME to a folder on a larger disk that you "
        "may write to, and run the same command again."
    )


def from_hub(error: BaseException) -> bool:
    """Whether an error of some library is, at bottom, a download that failed."""
    chain = list(_causes(error))
    kinds = (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, ConnectionError)
    full = _full_disk(chain, Path(constants.HF_HUB_CACHE))
    return full is not None or any(isinstance(cause, kinds) for cause in chain)


class _RateLimitError(Exception):
    def __init__(self, seconds: int) -> None:
        super().__init__(f"429, to be tried again in {seconds} s")
        self.seconds = seconds


def _raise_rate_limit(response: Any) -> None:
    if response.status_code == 429:
        # The standard header, or the one of the hub: RateLimit: "api";r=0;t=55
        stated = re.fullmatch(r"\s*(\d{1,9})\s*", response.headers.get("Retry-After", ""))
        stated = stated or re.search(r"\bt=(\d{1,9})", response.headers.get("RateLimit", ""))
        raise _RateLimitError(max(int(stated[1]), 1) if stated else 10)


@contextmanager
def _rate_limits_raised() -> Iterator[None]:
    """Answer to 429 here: the client library would wait for as long as the server likes."""
    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "response": [*before["response"], _raise_rate_limit]}
    try:
        yield
    finally:
        session.event_hooks = before


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full_disk(chain: Iterable[BaseException], cache: Path) -> OSError | None:
    """The error in a chain that a cache cannot be written, if there is one."""
    for error in chain:
        if isinstance(error, OSError):
            inside = error.filename is not None and cache in Path(str(error.filename)).parents
            denied = inside and error.errno in _DENIED
            # ``datasets`` looks for space first, and says so in words alone.
            if denied or error.errno in _FULL or "Not enough disk space" in str(error):
                return error
    return None


def _explain(chain: list[BaseException]) -> str:
    """Why something with the hub failed, and what to do."""
    first = first_line(chain[0])
    status = {e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)}

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(error, kinds) for error in chain)

    if any_is(_RateLimitError):
        return (
            f"the hub limits the rate of requests ({first}). Wait, or log in with `hf auth login` "
            "for a higher limit, and run the same command again: it resumes from the cache."
        )
    if any_is(GatedRepoError) or status & {401, 403}:
        return (
            "the hub does not give it to you: it is gated or private, or does not exist. Accept "
            "its terms on its page, log in with `hf auth login` or set HF_TOKEN, and check the "
            "name."
        )
    if any_is(RevisionNotFoundError):
        return "the hub's repository has no such revision. Check what follows the @."
    unreachable = any_is(LocalEntryNotFoundError, FileMetadataError) or any(map(_is_network, chain))
    if constants.HF_HUB_OFFLINE and unreachable:
        return (
            "it is not in the cache, and HF_HUB_OFFLINE is set, so the network is not used. "
            "Download what a suite needs with mmtard-bench fetch SUITE where there is a network."
        )
    if unreachable or any(code >= 500 for code in status):
        return (
            f"the hub could not be reached, or what answered was no hub: {_telling(chain)}. Check "
            "the network (a proxy or a login page in between?) and run the same command again: "
            "it resumes from the cache."
        )
    if any_is(HFValidationError):
        return "that is no name of a repository; write ORG/NAME."
    if any_is(RepositoryNotFoundError):
        return "there is no such repository on the hub. Check the name."
    if any_is(EntryNotFoundError):
        address = re.search(r"url: (\S+)", str(chain[0]))
        return f"a file is missing in the hub's repository: {address[1] if address else first}"
    if "Consistency check failed" in first:
        return f"a download was cut short ({first}) and is not kept. Run the same command again."
    return f"it could not be read: {first} Check the name, the files and the network."


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or bool(
        re.search(r"Connect|Timeout|Protocol|Network", type(error).__name__)
    )


def _telling(chain: list[BaseException]) -> str:
    """The error of a chain that says most: the deepest of the client's own."""
    known = [e for e in chain if _is_network(e) or isinstance(e, HfHubHTTPError)]
    error = known[0] if known else chain[-1]
    return f"{type(error).__name__}, {first_line(error)}"


def _snapshot(repository: str, commit: str, kind: Kind) -> Path:
    """Where the cache keeps a commit of a repository (huggingface_hub, "Manage your cache")."""
    folder = f"{kind}s--{repository.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / commit


def _is_damaged(link: Path) -> bool:
    """Whether a cached file is not what its checksum says; False where there is none.

    The cache links a file to one that is named by the hub's checksum: SHA-256 for large files,
    git's SHA-1 for the others.
    """
    stated = link.readlink().name if link.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", stated):
        return False
    digest = hashlib.sha256()
    if len(stated) == 40:
        digest = hashlib.sha1(b"blob %d\0" % link.stat().st_size)
    with link.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() != stated


def _forget(link: Path) -> None:
    link.resolve().unlink(missing_ok=True)
    link.unlink(missing_ok=True)
