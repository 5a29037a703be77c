"""Commands that say what is there: list, doctor."""

import argparse
import json
from dataclasses import asdict

from mmtard_bench.cli.common import Commands

KINDS = ("models", "datasets", "tasks", "threats", "protocols", "suites", "recipes")


def add(commands: Commands) -> None:
    """Add list and doctor."""
    command = commands.add_parser("list", help="list models, tasks, threats, suites, recipes ...")
    command.add_argument("kind", choices=KINDS)
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_list)

    command = commands.add_parser("doctor", help="check the installation and its versions")
    command.set_defaults(run=_doctor)


def _list(arguments: argparse.Namespace) -> int:
    if arguments.kind == "tasks" and arguments.json:
        print(json.dumps(_declarations(), indent=1))
        return 0
    rows = _listing(arguments.kind)
    if arguments.json:
        print(json.dumps([{"name": name, "description": text} for name, text in rows], indent=1))
        return 0
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def _listing(kind: str) -> list[tuple[str, str]]:
    from mmtard_bench import registry

    if kind == "suites":
        from mmtard_bench.tasks.suites import list_suites, load_suite

        suites = [load_suite(name) for name in list_suites()]
        return [(s.name, f"{s.description} ({len(s.threats)} threat models)") for s in suites]
    if kind == "recipes":
        from mmtard_bench.train.recipe import list_recipes, load_recipe

        return [(name, load_recipe(name).recipe.description) for name in list_recipes()]
    if kind == "protocols":
        found = [registry.protocols.get(name) for name in registry.protocols]
        return [(p.name, f"{p.description}; {p.samples}. {p.source}") for p in found]
    if kind == "tasks":
        return [(name, registry.tasks.get(name).description) for name in registry.tasks]
    if kind == "models":
        return [(name, _first_line(registry.models.get(name))) for name in registry.models]
    if kind == "datasets":
        return [(name, _first_line(registry.datasets.get(name))) for name in registry.datasets]
    both = (registry.attacks, registry.fast_attacks)
    return [
        (name, _first_line(next(kind.get(name) for kind in both if name in kind)))
        for name in registry.attack_names()
    ]


def _declarations() -> list[dict[str, object]]:
    """The tasks with all that is known of them; long lists of names by their length."""
    from mmtard_bench import registry

    tables = [asdict(registry.tasks.get(name)) for name in registry.tasks]
    for table in tables:
        table["classes"], table["templates"] = len(table["classes"]), len(table["templates"])
    return tables


def _first_line(item: object) -> str:
    return (getattr(item, "__doc__", None) or "").strip().split("\n")[0]


def _doctor(_: argparse.Namespace) -> int:
    from mmtard_bench.cli.doctor import examine

    problems = 0
    for finding in examine():
        print(f"{finding.name:<22} {finding.value}")
        if finding.problem:
            problems += 1
            print(f"{'':<22} -> {finding.problem}")
    print("everything fits together" if not problems else f"{problems} problem(s)")
    return 1 if problems else 0
