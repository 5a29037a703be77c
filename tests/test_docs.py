"""What README, tutorials and how-to pages show runs; the reference names every key."""

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from mmtard_bench.cli import main
from mmtard_bench.tasks.suites import _SuiteFile, _ThreatTable
from mmtard_bench.tasks.tables import TaskTable
from mmtard_bench.train.methods import METHODS
from mmtard_bench.train.recipe import InnerAttack, Lora, Recipe, Validation
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    *sorted((DOCS / "tutorials").glob("*.md")),
    *sorted((DOCS / "how-to").glob("*.md")),
]
BLOCK = re.compile(
    r"(?P<why><!-- not run: [^\n]+ -->\n)?^```(?P<kind>\w+)(?: title=\"(?P<file>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    kind: str
    file: str | None
    text: str
    run: bool


def blocks(page: Path) -> list[Block]:
    return [
        Block(match["kind"], match["file"], match["text"], match["why"] is None)
        for match in BLOCK.finditer(page.read_text())
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, own, short_attacks):
    """Every block, in order, in one directory, as a reader runs them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = {*sys.modules}
    (tmp_path / "leaderboard").symlink_to(REPOSITORY / "leaderboard")
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.run and block.kind == "python":
            exec(compile(block.text, str(page), "exec"), {"__name__": "page"})
        elif block.run and block.kind == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                run(line)
    for name in {*sys.modules} - modules:
        if name.startswith("my_"):
            monkeypatch.delitem(sys.modules, name)


def run(line: str) -> None:
    """A command, with the wildcards that a shell would expand."""
    name, *words = shlex.split(line, comments=True)
    if name == "python":
        runpy.run_path(*words, run_name="__main__")
        return
    assert name == "mmtard-bench", line
    expanded = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words]
    assert main([word for several in expanded for word in several]) == 0, line


KEYS: dict[str, list[type[BaseModel]]] = {
    "suites": [_SuiteFile, _ThreatTable, TaskTable],
    "recipes": [Recipe, InnerAttack, Validation, Lora, *(m.options for m in METHODS.values())],
}


@pytest.mark.parametrize("page", KEYS)
def test_the_reference_names_every_key(page):
    text = (DOCS / "reference" / f"{page}.md").read_text()
    named = set(re.findall(r"^\| (?:[^|]+\| )??`(\w+)` \|", text, re.MULTILINE))
    assert named == {key for model in KEYS[page] for key in model.model_fields}


def test_the_example_runs(capsys, monkeypatch, short_attacks):
    monkeypatch.setattr(sys, "argv", ["score_a_model.py"])
    runpy.run_path(str(REPOSITORY / "examples" / "score_a_model.py"), run_name="__main__")
    rows = re.findall(r"^(\S+) +(\d+/255) +([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.M)
    assert len(rows) == 4
    accuracy = {(threat, eps): (float(clean), float(robust)) for threat, eps, clean, robust in rows}
    for (_, eps), (clean, robust) in accuracy.items():
        assert clean > 80
        assert robust <= accuracy["pgd-20", eps][1]
    assert accuracy["autoattack-standard", "16/255"] < accuracy["autoattack-standard", "4/255"]
