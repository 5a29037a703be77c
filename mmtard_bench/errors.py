"""The one exception that the command line turns into a sentence and exit status 2."""

import re


class InputError(ValueError):
    """Something outside this package is not as it must be.

    The message is for a person: what was given, what was expected, what to do. Code that can tell
    a user's mistake from its own raises this; anything else that escapes is a bug.
    """


class StorageError(InputError):
    """A result cannot be written: the disk is full, or the directory read-only."""


class DamagedImageError(InputError):
    """The image of a sample is missing, cut short, or no image: a suite may leave it out."""


def shown(name: str) -> str:
    """A name of somebody's data, short and without characters that format, for a record's text."""
    return re.sub(r"[^\w ,.()'-]", "?", name.strip())[:40]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, of 240 characters at most; its kind if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


def reason(error: BaseException) -> str:
    """Why something failed, for a record: a sentence as it is, of other errors kind and line."""
    if isinstance(error, InputError):
        return str(error)
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class ModelError(InputError):
    """The model under test cannot be scored: its answers are unusable."""
