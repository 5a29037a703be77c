"""Text from outside in markdown, terminals and file names; tables. Imports without torch."""

import re
from collections.abc import Sequence

from tabulate import tabulate


def escape(text: str) -> str:
    """Text from a record or a file inside markdown: one line, nothing that formats."""
    return re.sub(r"([\\`*_<>|\[\]#~$@&])", r"\\\1", " ".join(text.split()))


def printable(text: str) -> str:
    """Text from a record or a data set for a terminal, without control characters."""
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in text)


def slug(name: str) -> str:
    """A name as a part of a file name; "model" if nothing of it can be."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", name)[-80:].strip("-.") or "model"


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A table whose cells stay as they are written. Cells must be escaped."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
