"""The records of a run in one file: columns for samples, and what records share only once.

``unpack`` gives back the records that were packed, which are as strict here as in a run. A file is
exactly the text that ``pack`` writes.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from mmtard_bench.errors import InputError
from mmtard_bench.records.recall import Ranks
from mmtard_bench.records.schema import Count, Digest, Record, Sample, seal, unseal
from mmtard_bench.schema import Strict, explain

ROBUST, WRONG = ".", "x"


class Shared(Strict):
    """The samples of a task: their ids and labels."""

    ids: list[str]
    labels: list[Count]


class Columns(Strict):
    """What a record says about its samples, in their order.

    A character of ``verdicts`` is "." for robust, "x" for wrong on the clean image, else the letter
    of the stage that broke it, its place in ``stages``; a capital is unconfirmed. ``edits`` holds
    (original, adversarial) names, ``ranks`` those of retrieval.
    """

    stages: list[str] = Field(max_length=20)
    verdicts: str = Field(pattern=r"^[.xa-tA-T]*$")
    predictions: list[Count]
    forward: list[Count]
    backward: list[Count]
    edits: list[tuple[str, str] | None]
    ranks: list[Ranks]


class Packed(Strict):
    """A record without its samples, and their columns."""

    record: dict[str, Any]
    columns: Columns


class Pack(Strict):
    """The records of a model on a suite; ``samples`` by the digest of their ids."""

    pack_version: Literal[1]
    samples: dict[Digest, Shared]
    records: list[Packed] = Field(min_length=1)


def pack(records: Sequence[Record]) -> str:
    """Records as the text of a file. Raises InputError if they disagree on a sample's label."""
    shared: dict[str, Shared] = {}
    for record in records:
        ids = [sample.id for sample in record.samples]
        one = Shared(ids=ids, labels=[sample.label for sample in record.samples])
        if shared.setdefault(record.sample_ids_digest, one) != one:
            raise InputError(
                "Two records have the same samples with other labels, which one file cannot hold."
            )
    body = Pack(pack_version=1, samples=shared, records=[_packed(record) for record in records])
    return _to_text(body)


def unpack(text: str, where: str) -> list[Record]:
    """The records in the text of a file. Raises InputError if it is not as ``pack`` writes it."""
    try:
        packed = Pack.model_validate_json(unseal(text))
        records = [_record(one, packed) for one in packed.records]
        why = "" if pack(records) == text else "it is not the text that this program wrote."
    except ValidationError as error:
        why = explain(error)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        why = f"{error}." if isinstance(error, ValueError) else f"it is no pack ({error!r})."
    if why:
        raise InputError(
            f"The records in {where} were edited or cut short, or are no records at all: {why} "
            "Write them again with mmtard-bench submit."
        )
    return records


def _packed(record: Record) -> Packed:
    samples = record.samples
    stages = sorted({s.broken_by for s in samples if s.broken_by is not None})
    letters = {name: chr(ord("a") + place) for place, name in enumerate(stages)}
    return Packed(
        record=record.model_dump(mode="json", exclude={"samples"}),
        columns=Columns(
            stages=stages,
            verdicts="".join(_verdict(sample, letters) for sample in samples),
            predictions=[sample.prediction for sample in samples],
            forward=[sample.forward for sample in samples],
            backward=[sample.backward for sample in samples],
            edits=[(s.edit.original, s.edit.adversarial) if s.edit else None for s in samples]
            if any(s.edit for s in samples)
            else [],
            ranks=[sample.ranks for sample in samples if sample.ranks is not None],
        ),
    )


def _verdict(sample: Sample, letters: dict[str, str]) -> str:
    if sample.broken_by is None:
        return ROBUST if sample.robust else WRONG
    letter = letters[sample.broken_by]
    return letter.upper() if sample.unconfirmed else letter


def _record(one: Packed, packed: Pack) -> Record:
    columns = one.columns
    shared = packed.samples[one.record["sample_ids_digest"]]
    n = len(shared.ids)
    edits = columns.edits or [None] * n
    ranks: Sequence[Ranks | None] = columns.ranks or [None] * n
    lists = (shared.labels, columns.verdicts, columns.predictions, columns.forward)
    if any(len(values) != n for values in (*lists, columns.backward, edits, ranks)):
        raise ValueError(f"its columns do not have {n} samples each")
    samples = []
    for place, verdict in enumerate(columns.verdicts):
        broken_by = None
        if verdict not in (ROBUST, WRONG):
            broken_by = columns.stages[ord(verdict.lower()) - ord("a")]
        sample = {
            "id": shared.ids[place],
            "label": shared.labels[place],
            "prediction": columns.predictions[place],
            "clean_correct": verdict != WRONG,
            "robust": verdict == ROBUST,
            "broken_by": broken_by,
            "unconfirmed": verdict.isupper(),
            "forward": columns.forward[place],
            "backward": columns.backward[place],
        }
        edit, rank = edits[place], ranks[place]
        if edit is not None:
            sample["edit"] = {"original": edit[0], "adversarial": edit[1]}
        if rank is not None:
            sample["ranks"] = rank.model_dump()
        samples.append(sample)
    return Record.model_validate_json(json.dumps({**one.record, "samples": samples}))


def _to_text(body: Pack) -> str:
    """JSON, a line a record and a line the samples of a task, closed by a hash of the rest."""

    def line(value: Strict) -> str:
        return json.dumps(
            value.model_dump(mode="json"),
            ensure_ascii=False,
            separators=(",", ":"),
            allow_nan=False,
        )

    shared = ",\n".join(f'  "{key}": {line(value)}' for key, value in body.samples.items())
    records = ",\n".join(f"  {line(record)}" for record in body.records)
    return seal(
        f'{{\n "pack_version": {body.pack_version},\n "samples": {{\n{shared}\n }},\n'
        f' "records": [\n{records}\n ]'
    )
