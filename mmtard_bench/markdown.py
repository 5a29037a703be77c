"""Text from outside inside markdown, and tables. Imports without torch."""

import re
from collections.abc import Sequence

from tabulate import tabulate


def escape(text: str) -> str:
    """Text from a record or a file inside markdown: one line, nothing that formats."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split()))


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A table whose cells stay as they are written. Cells must be escaped."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
