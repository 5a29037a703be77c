"""Text from outside inside markdown or on a terminal, and tables. Imports without torch."""

import re
from collections.abc import Sequence

from tabulate import tabulate


def escape(text: str) -> str:
    """Text from a record or a file inside markdown: one line, nothing that formats."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split()))


def printable(text: str) -> str:
    """Text from a record or a data set for a terminal, without control characters."""
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in text)


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A table whose cells stay as they are written. Cells must be escaped."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
