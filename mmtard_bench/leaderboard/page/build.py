"""The page: one HTML file with its style, script and data, which loads nothing else.

Texts of records and cards are JSON in the page, escaped so that no text can end the element. The
script puts them into text nodes. A Content-Security-Policy allows only this script and this style.
"""

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.page.facts import page_facts

SCRIPTS = ("dom.js", "charts.js", "suite.js", "page.js")
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def build(board: Board, *, beside: str = "README.md") -> str:
    """The page of a leaderboard; the same board gives the same bytes.

    ``beside`` is the markdown file with the same figures, for readers without scripts.
    """
    facts = page_facts(board)
    style = asset("page.css")
    script = "\n".join(asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return Template(asset("page.html")).substitute(
        policy=policy,
        style=style,
        script=script,
        data=_inert(facts),
        beside=escape(beside),
    )


def asset(name: str) -> str:
    """The text of a file in ``assets/``."""
    return (files("mmtard_bench.leaderboard.page") / "assets" / name).read_text("utf-8")


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _inert(facts: dict[str, Any]) -> str:
    """JSON without the characters that could end its HTML element."""
    text = json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)
