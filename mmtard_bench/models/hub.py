"""The model hub: downloads into its cache, and what to do when it refuses."""

import errno
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
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

from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.models.weights import first_line

_LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of hub and model libraries; what matters in them raises.

    The bars of downloads stay on a terminal: gigabytes in silence would look like a crash.
    """
    bars = not are_progress_bars_disabled()
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            enable_progress_bars()


def hub_file(spec: str, repository: str, names: Sequence[str]) -> Path:
    """The first of these files that a repository has, from the cache or else from the hub.

    Raises InputError that says what to do.
    """
    missing = []
    for name in names:
        try:
            with quiet():
                return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:
            # Not there, or, without an answer from the hub, not in the cache: perhaps the next.
            missing.append(error)
        except Exception as error:  # whatever else the client and the system raise
            raise refusal(spec, error) from error
    raise refusal(spec, missing[0]) from missing[0]


def hub_folder(spec: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A folder with the files of a repository that match, from the cache or else from the hub.

    Raises InputError that says what to do.
    """
    try:
        with quiet():
            found = snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # whatever the client and the system raise
        raise refusal(spec, error) from error
    return Path(found)


def refusal(spec: str, error: BaseException) -> InputError:
    """The error for a download that failed: what happened, and what to do."""
    kind = StorageError if _disk_is_full(error) else InputError
    return kind(f"'{spec}' could not be loaded from the hub: {_why(error)}")


def from_hub(error: BaseException) -> bool:
    """Whether an error of some library is, at bottom, a download that failed."""
    kinds = (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, ConnectionError)
    return _disk_is_full(error) or any(isinstance(cause, kinds) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(getattr(cause, "errno", None) in full for cause in _causes(error))


def _status(error: BaseException) -> int | None:
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(cause, HfHubHTTPError) and response is not None:
            return int(response.status_code)
    return None


def _why(error: BaseException) -> str:
    causes, status, said = list(_causes(error)), _status(error), first_line(error)

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if _disk_is_full(error):
        return (
            "the disk is full. Free space, or let HF_HOME name a folder on another disk; the same "
            "command goes on from there."
        )
    if is_a(GatedRepoError):
        return (
            f"the repository is gated. Accept the conditions on its page, then {_LOG_IN}, with an "
            "account that was granted access."
        )
    if is_a(RevisionNotFoundError):
        return f"it has no such revision. Use a branch, tag or commit that its page lists. ({said})"
    if is_a(RepositoryNotFoundError) or status in (401, 403):
        return (
            f"there is no such repository, or it is private. Check the name; for a private one "
            f"{_LOG_IN}. ({said})"
        )
    if status == 429:
        return f"it allows no more requests for now. Wait some minutes, or {_LOG_IN}. ({said})"
    if status is not None and status >= 500:
        return f"the hub itself fails with status {status}. Try again later. ({said})"
    if is_a(EntryNotFoundError) and not is_a(LocalEntryNotFoundError):
        return f"the repository has no such file, so it holds another kind of model. ({said})"
    if is_a(HFValidationError):
        return f"that is no name of a repository; write ORG/NAME. ({said})"
    if is_a(FileMetadataError):
        return (
            "something else answers in its place, perhaps a proxy's log-in page. Check the network "
            f"and HF_ENDPOINT. ({said})"
        )
    if "Consistency check failed" in str(error):
        return f"the download was cut short. Run the same command again. ({said})"
    return (
        f"{said} Check the name and the network; with HF_HUB_OFFLINE=1 only what is in the cache "
        "can be used."
    )
