"""The workflows have few rights, take no text from outside into a shell, and run what there is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(
    set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"}
)
EXPRESSIONS = {
    "github.event.pull_request.number",
    "github.ref",
    "matrix.python",
}


def workflow(path: Path) -> dict[Any, Any]:
    body: dict[Any, Any] = yaml.safe_load(path.read_text("utf-8"))
    return body


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_nothing_to_take(path):
    body = workflow(path)
    assert body["permissions"] == {"contents": "read"}
    assert body["concurrency"]["cancel-in-progress"] is True
    for job in body["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90
    text = path.read_text("utf-8")
    assert "secrets" not in re.sub(r"(?m)^#.*", "", text)
    assert set(re.findall(r"\$\{\{ *(.*?) *\}\}", text)) - {""} <= EXPRESSIONS
    for step in steps(path):
        assert "${{" not in step.get("run", "")
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
        if "checkout" in step.get("uses", ""):
            assert step["with"] == {"fetch-depth": 0, "persist-credentials": False}


def test_entries_are_checked_on_pull_requests():
    path = GITHUB / "workflows" / "entries.yml"
    body = workflow(path)
    # YAML 1.1 takes "on" for a truth. This event runs the base's workflow on the base's code, so
    # nothing may check the branch out.
    assert body[True] == {"pull_request_target": {"paths": ["leaderboard/**"]}}
    assert [step["run"] for step in steps(path) if "run" in step] == [
        "make install",
        'git fetch --no-tags origin "refs/pull/$NUMBER/head"',
        "make check-entries",
    ]
    (job,) = body["jobs"].values()
    assert job["env"]["BASE"] == "HEAD"
    assert job["env"]["BRANCH"] == "FETCH_HEAD"
    for other in WORKFLOWS:
        assert other == path or "pull_request_target" not in other.read_text("utf-8")


def test_every_step_exists():
    targets = re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text())
    for path in WORKFLOWS:
        for step in steps(path):
            command, *arguments = step.get("run", "make").split()
            if command == "make":
                assert set(arguments) <= set(targets)
            elif command != "git":
                assert os.access(REPOSITORY / command, os.X_OK)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_expands_nothing_in_a_base(tmp_path):
    base = f'$(shell touch {tmp_path}/one)"; touch {tmp_path}/two; "`touch {tmp_path}/three`'
    shown = 'check-entries:\n\t@printf "%s" "$$BASE"\n'
    kept = "export BASE ?= origin/main\n"
    assert kept in (REPOSITORY / "Makefile").read_text()
    (tmp_path / "Makefile").write_text(kept + shown)
    environment = {**os.environ, "BASE": base}
    done = subprocess.run(
        ["make", "-s"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == base
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_that_github_takes(path):
    form = workflow(path)
    assert {"name", "description", "title", "labels", "body"} == set(form)
    named = [part for part in form["body"] if part["type"] != "markdown"]
    ids = [part["id"] for part in named]
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"]["label"] for part in named)
    assert {part["type"] for part in form["body"]} <= {
        "markdown",
        "input",
        "textarea",
        "dropdown",
        "checkboxes",
    }


def test_there_are_three_forms_and_a_template():
    assert [path.stem for path in FORMS] == ["disputed-row", "new-entry", "stronger-attack"]
    assert "- [ ]" in (GITHUB / "pull_request_template.md").read_text("utf-8")


class Clone:
    """A clean clone of what is committed, whose "installed" environment is the one of the tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git(REPOSITORY, "clone", "-q", "--no-hardlinks", str(REPOSITORY), str(root))
        self.git(root, "remote", "set-url", "origin", str(root))
        self.git(root, "checkout", "-q", "-b", "base")
        self.git(root, "checkout", "-q", "-b", "entry")
        binaries = root / ".venv" / "bin"
        binaries.mkdir(parents=True)
        code = f'import sys; sys.path.insert(0, "{root}"); from mmtard_bench.cli import main'
        program = f"#!{sys.executable}\n{code}\nsys.exit(main())\n"
        (binaries / "mmtard-bench").write_text(program)
        (binaries / "mmtard-bench").chmod(0o755)
        (root / ".venv" / ".installed").touch()  # newer than what make compares it with

    @staticmethod
    def git(where: Path, *arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *arguments], cwd=where, check=True)

    def bench(self, *arguments: str) -> str:
        program = [str(self.root / ".venv/bin/mmtard-bench"), *arguments]
        return self._run(program, {}).stdout

    def workflow(self) -> subprocess.CompletedProcess[str]:
        """Commit everything, then run the steps of the workflow on the base until one fails."""
        self.git(self.root, "add", "-A")
        self.git(self.root, "commit", "-q", "--allow-empty", "-m", "an entry")
        self.git(self.root, "update-ref", "refs/pull/7/head", "entry")
        self.git(self.root, "checkout", "-q", "base")
        env = {"NUMBER": "7", "BASE": "HEAD", "BRANCH": "FETCH_HEAD"}
        for step in steps(GITHUB / "workflows" / "entries.yml"):
            if "run" not in step:
                continue
            done = self._run(["bash", "-e", "-c", step["run"]], env, check=False)
            if done.returncode:
                break
        self.git(self.root, "checkout", "-q", "entry")
        return done

    def _run(
        self, command: list[str], env: dict[str, str], *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=check
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_workflow_in_a_clean_clone(tmp_path):
    clone = Clone(tmp_path / "clone")
    done = clone.workflow()
    assert done.returncode == 0, done.stdout + done.stderr

    clone.bench("run", "quick-v1", "--model", "tiny-clip")
    clone.bench("submit", "runs/quick-v1", "--name", "another")
    done = clone.workflow()
    assert done.returncode != 0
    assert "stale: write them again" in done.stderr
    assert "another" in done.stdout

    clone.bench("leaderboard")
    done = clone.workflow()
    assert done.returncode == 0, done.stdout + done.stderr

    records = clone.root / "leaderboard/entries/another/quick-v1.json"
    records.write_text(
        records.read_text("utf-8").replace('"verdicts":"', '"verdicts":".', 1), "utf-8"
    )
    done = clone.workflow()
    assert done.returncode != 0
    assert "were edited or cut short" in done.stderr
    assert "Traceback" not in done.stderr

    # Code that lets everything pass: it is not run, and beside an entry it is refused.
    checks = clone.root / "mmtard_bench/cli/verify.py"
    checks.write_text(f"{checks.read_text('utf-8')}\n\ndef _verify(_): return 0\n", "utf-8")
    done = clone.workflow()
    assert done.returncode != 0
    assert "An entry comes without code" in done.stderr
