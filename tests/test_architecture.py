"""Imports go one way, and the public names are these."""

import ast
import subprocess
import sys
from pathlib import Path

import mmtard_bench
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "mmtard_bench"
# Who may import whom, lowest first: a part imports from lower layers, never from its own.
LAYERS = [
    {"errors", "muted"},
    {"files", "text"},
    {"schema"},
    {"types"},
    {"registry", "hub"},
    {"records"},
    {"data", "models"},
    {"tasks"},
    {"attacks"},
    {"evaluation"},
    {"api", "leaderboard", "testing", "train"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """The parts of this package that a file imports while it runs (not for type checking)."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "mmtard_bench":
                names = [f"mmtard_bench.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("mmtard_bench.")}
    return found & set(LEVEL)


def test_every_module_has_a_layer():
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/*.py")}
    assert parts - {"__init__"} == set(LEVEL)


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in imports(path) - {part}
            if LEVEL[other] >= LEVEL[part]
        ]
    assert wrong == []


def test_nothing_but_the_command_line_imports_train():
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "train" in imports(path) and path.relative_to(PACKAGE).parts[0] != "train"
    ]
    assert set(users) <= {"cli/training.py", "cli/listing.py"}


def test_the_leaderboard_imports_without_torch():
    code = (
        "import sys, mmtard_bench.leaderboard.page, mmtard_bench.leaderboard.standings; "
        "import mmtard_bench.records.figures, mmtard_bench.records.compare; "
        "import mmtard_bench.cli; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_pinned():
    assert mmtard_bench.__all__ == [
        "Attacked",
        "Clip",
        "InputError",
        "Preprocess",
        "Record",
        "Task",
        "ThreatModel",
        "attack",
        "compare",
        "evaluate",
        "frame",
        "list_attacks",
        "list_datasets",
        "list_models",
        "list_suites",
        "list_tasks",
        "load_model",
        "read_record",
        "records",
        "register_attack",
        "register_dataset",
        "register_model",
        "register_task",
        "run",
        "task_of",
    ]
    for name in mmtard_bench.__all__:
        assert getattr(mmtard_bench, name).__doc__
