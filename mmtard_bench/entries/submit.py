"""From the records of a run to an entry."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from mmtard_bench.entries.card import Card, card_from_text, card_to_text
from mmtard_bench.entries.folder import Entry, names_of, read_entry, require_distinct
from mmtard_bench.entries.pack import pack
from mmtard_bench.errors import InputError, explain
from mmtard_bench.records import Record, oldest_first, write_atomically
from mmtard_bench.summary import is_complete

LISTS = ("authors",)
"""Fields of a card that are lists; their values are separated by semicolons."""


def submit(
    records: Sequence[Record], *, name: str, facts: Mapping[str, str], root: Path
) -> tuple[Entry, list[Path]]:
    """Write the records of a model as the entry ``name`` below ``root``.

    ``facts`` are fields of its card; those of an entry that is there already stay, unless the
    weights are others. In the records the model takes the entry's name, and where its weights are.
    Returns the entry and the files that were written. Raises InputError, and then writes nothing.
    """
    require_distinct([*(names_of(root) if root.is_dir() else ()), name])
    runs = newest(records)
    folder = root / name
    card = _card(next(iter(runs.values()))[0], name, facts, folder / "card.json")
    files = {"card.json": card_to_text(card)}
    for suite, found in runs.items():
        files[f"{suite}.json"] = pack([_named(record, card) for record in found])
    _rehearse(folder, files)
    for file, text in files.items():
        write_atomically(folder / file, text)
    return read_entry(folder), [folder / file for file in files]


def _rehearse(folder: Path, files: Mapping[str, str]) -> None:
    """Raise InputError unless the entry will be in order, with what is there already."""
    with tempfile.TemporaryDirectory() as elsewhere:
        place = Path(elsewhere).resolve() / folder.name
        if folder.is_dir():
            shutil.copytree(folder, place, symlinks=True)
        for file, text in files.items():
            write_atomically(place / file, text)
        try:
            read_entry(place)
        except InputError as error:
            raise InputError(str(error).replace(str(place), str(folder))) from error


def newest(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each suite, the newest of each place, in order.

    Raises InputError for records of several models, and for a run that is not whole.
    """
    models = {record.model.digest for record in records}
    if len(models) != 1:
        raise InputError(
            f"The records are of {len(models)} models; an entry has one. Name its directory, "
            "such as runs/digits-v1/my-clip-1a2b3c4d."
        )
    runs: dict[str, dict[tuple[str, str], Record]] = defaultdict(dict)
    for record in oldest_first(records):
        suite = record.suite.name if record.suite else ""
        if not suite or "+" in suite:
            raise InputError(
                f"A record is of {suite or 'no suite'}; an entry has whole suites, without --limit "
                "and --seed."
            )
        runs[suite][record.task.name, record.threat.name] = record
    for suite, places in runs.items():
        if not is_complete(list(places.values())):
            raise InputError(
                f"The run of {suite} lacks records or has failed ones; run the suite again with "
                "the same command, which goes on from there."
            )
    return {
        suite: [places[place] for place in sorted(places)] for suite, places in sorted(runs.items())
    }


def _card(record: Record, name: str, facts: Mapping[str, str], path: Path) -> Card:
    model = record.model
    body: dict[str, object] = {"weights": model.source}
    if path.is_file():
        before = card_from_text(path.read_text("utf-8"), str(path))
        if before.digest == model.digest:
            body = before.model_dump()
    for key, value in facts.items():
        body[key] = [v.strip() for v in value.split(";")] if key in LISTS else value
    body.update(name=name, digest=model.digest, parameters=model.parameters)
    try:
        return Card.model_validate(body)
    except ValidationError as error:
        raise InputError(f"The model card of '{name}' is not valid: {explain(error)}") from error


def _named(record: Record, card: Card) -> Record:
    facts = record.model.model_copy(update={"name": card.name, "source": card.weights})
    return record.model_copy(update={"model": facts})
