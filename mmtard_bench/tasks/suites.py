"""Read suites: TOML files with tasks, threat models, a number of samples and a seed.

A threat model applies to every task, or to the tasks that its key ``tasks`` names.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmtard_bench import registry
from mmtard_bench.errors import InputError, reason
from mmtard_bench.files import suite_folder
from mmtard_bench.records.schema import digest_of
from mmtard_bench.schema import Strict, read_table, validate
from mmtard_bench.tasks.tables import TaskTable, resolve_task
from mmtard_bench.types import Eps, Suite, Surface, Task, ThreatModel, ThreatNorm


class _ThreatTable(Strict):
    attack: str
    norm: ThreatNorm
    # Anything, so that a decimal gets the sentence that Eps has for it.
    eps: Any
    surface: Surface = "native"
    tasks: list[str] | None = Field(default=None, min_length=1)


class _SuiteFile(Strict):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*-v[0-9]+$")
    description: str
    protocol: str | None = None
    n: Annotated[int, Field(ge=1)] | Literal["all"]
    seed: int = Field(ge=0, lt=2**32)
    block: int = Field(default=64, ge=1)
    skip_damaged: bool = False
    curve: bool = False
    tasks: list[str | TaskTable] = Field(min_length=1)
    threats: list[_ThreatTable] = Field(min_length=1)


def shipped_suites() -> list[str]:
    """The names of the suites that ship."""
    return sorted(path.stem for path in suite_folder().glob("*.toml"))


def list_suites() -> list[str]:
    """The names of the suites that ship, and of those of installed packages."""
    return sorted(_suite_files())


def _suite_files() -> dict[str, Path]:
    """The file of every suite by name. A suite that ships hides others with its name.

    A package adds the .toml files of one of its folders by an entry point of the group
    ``mmtard_bench.suites``, whose value is that folder as a package: ``my_package.suites``.
    """
    found: dict[str, Path] = {}
    for entry in entry_points(group="mmtard_bench.suites"):
        try:
            folder = Path(str(resources.files(entry.value)))
        except (ImportError, TypeError) as error:
            warnings.warn(
                f"The suites of the entry point '{entry.name}' ({entry.value}) are missing: "
                f"{reason(error)}. Repair or remove it.",
                stacklevel=2,
            )
            continue
        found |= {path.stem: path for path in folder.glob("*.toml")}
    return found | {name: suite_folder() / f"{name}.toml" for name in shipped_suites()}


def load_suite(name: str) -> Suite:
    """Load a suite by name, or from a path that ends in .toml. Raises InputError."""
    path = Path(name) if name.endswith(".toml") else suite_folder() / f"{name}.toml"
    if not name.endswith(".toml") and name not in shipped_suites():
        files = _suite_files()
        if name not in files:
            raise InputError(
                f"There is no suite '{name}'. {registry.near_matches(name, files)} "
                "A path to a suite of your own ends in .toml."
            )
        path = files[name]
    parsed = validate(
        _SuiteFile,
        read_table(path, "suite"),
        f"suite {path}",
        "docs/reference/suites.md lists every key.",
    )
    if parsed.name != path.stem:
        raise InputError(f"The suite in {path} is called '{parsed.name}'; expected '{path.stem}'.")
    return _assemble(parsed)


def with_overrides(suite: Suite, *, n: int | None, seed: int | None) -> Suite:
    """The suite with another number of samples or seed. Its name and digest change with them."""
    name, digest = suite.name, suite.digest
    for letter, value, own in (("n", n, suite.n), ("seed", seed, suite.seed)):
        if value is not None and value != own:
            name += f"+{letter}{value}"
            digest = digest_of([digest, letter, value])
    return replace(
        suite,
        name=name,
        digest=digest,
        n=suite.n if n is None else n,
        seed=suite.seed if seed is None else seed,
    )


def _assemble(parsed: _SuiteFile) -> Suite:
    from mmtard_bench.registry import attack_family

    tasks = tuple(resolve_task(t) for t in parsed.tasks)
    threats = tuple(
        ThreatModel(t.attack, t.norm, Eps.parse(t.eps, norm=t.norm), t.surface)
        for t in parsed.threats
    )
    for threat in threats:
        attack_family(threat.attack)
    for kind, names in (
        ("task", [task.name for task in tasks]),
        ("threat model", [threat.name for threat in threats]),
    ):
        if len(set(names)) != len(names):
            raise InputError(f"The suite '{parsed.name}' names a {kind} twice.")
    if len({task.metric for task in tasks}) > 1:
        raise InputError(
            f"The suite '{parsed.name}' mixes classification and retrieval, whose figures have no "
            "common average; write a suite for each."
        )
    _require_protocol(parsed, threats)
    only = {
        threat.name: table.tasks
        for threat, table in zip(threats, parsed.threats, strict=True)
        if table.tasks is not None
    }
    if parsed.curve:
        _require_curve(parsed.name, tasks, threats)
        threats = tuple(sorted(threats, key=lambda threat: -float(threat.eps)))
    plan = _plan(parsed.name, tasks, threats, only)
    meaning: dict[str, Any] = {
        "protocol": parsed.protocol,
        "tasks": [_meaning(task) for task in tasks],
        "threats": [threat.name for threat in threats],
        "n": parsed.n,
        "seed": parsed.seed,
        "block": parsed.block,
    }
    if only:
        meaning["only"] = {name: sorted(named) for name, named in only.items()}
    if parsed.skip_damaged:
        meaning["skip_damaged"] = True
    if parsed.curve:
        meaning["curve"] = True
    return Suite(
        name=parsed.name,
        description=parsed.description,
        protocol=parsed.protocol,
        plan=plan,
        n=None if parsed.n == "all" else parsed.n,
        seed=parsed.seed,
        block=parsed.block,
        skip_damaged=parsed.skip_damaged,
        curve=parsed.curve,
        digest=hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest(),
    )


def _plan(
    suite: str,
    tasks: tuple[Task, ...],
    threats: tuple[ThreatModel, ...],
    only: Mapping[str, Sequence[str]],
) -> tuple[tuple[Task, tuple[ThreatModel, ...]], ...]:
    """Each task with its threat models; ``only`` names the tasks of those that are restricted."""
    known = [task.name for task in tasks]
    for threat, named in only.items():
        for name in sorted(set(named) - set(known)):
            raise InputError(
                f"The suite '{suite}' restricts {threat} to the task '{name}', which it does not "
                f"have. {registry.near_matches(name, known)}"
            )
    plan = tuple(
        (task, tuple(t for t in threats if task.name in only.get(t.name, known))) for task in tasks
    )
    for task, its_threats in plan:
        if not its_threats:
            raise InputError(f"The suite '{suite}' has no threat model for '{task.name}'.")
    return plan


def _require_curve(suite: str, tasks: tuple[Task, ...], threats: tuple[ThreatModel, ...]) -> None:
    if any(task.metric == "retrieval" for task in tasks):
        raise InputError(
            f"The suite '{suite}' has curve = true and retrieval tasks, whose ranks need an attack "
            "on every image at every radius; leave curve out."
        )
    if len({replace(threat, eps=threats[0].eps) for threat in threats}) == len(threats):
        raise InputError(
            f"The suite '{suite}' has curve = true, but no attack at two radii; add radii, or "
            "leave curve out."
        )


def _require_protocol(parsed: _SuiteFile, threats: tuple[ThreatModel, ...]) -> None:
    if parsed.protocol is None:
        return
    outside = set(threats) - set(registry.protocols.get(parsed.protocol).threats)
    if outside:
        raise InputError(
            f"The suite '{parsed.name}' says that it follows {parsed.protocol}, which has no "
            f"threat model {min(t.name for t in outside)}."
        )


def _meaning(task: Task) -> dict[str, Any]:
    """The fields of a task that decide a result. Newer fields count only if they are set."""
    values = {**asdict(task), "description": ""}
    for key in ("licence", "citation", "surface", "shard_samples"):
        del values[key]
    for key in ("n_classes", "samples", "samples_file"):
        if values[key] is None:
            del values[key]
    return values
