"""What is known after one (model, task, threat model): the schema of a record.

A record holds per-sample truth; everything else that could be derived from it is recomputed on
every read. A file is exactly the canonical text of its record, so no byte of it can change
unnoticed by whoever knows its digest, and no figure can change without its samples.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from mmtard_bench.errors import InputError
from mmtard_bench.files import write_atomically
from mmtard_bench.records.black_box import BlackBox
from mmtard_bench.records.edits import NameEdit
from mmtard_bench.records.recall import Ranks, Recalls, recalls_of, require_ranks
from mmtard_bench.records.statistics import wilson
from mmtard_bench.schema import Strict

SCHEMA_VERSION: Literal[2] = 2
"""Of the records that are written. Version 1 had digests of models that covered their weights alone
(see ``mmtard_bench.models.digest``), and of prompts that covered one template's tokens."""


Count = Annotated[int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Scalars = dict[str, str | int | float]


class _Sparse(Strict):
    """Fields that only some records have are None by default, and then are not written at all."""

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        body: dict[str, Any] = handler(self)
        return {k: v for k, v in body.items() if v is not None or fields[k].is_required()}


class SuiteFacts(Strict):
    """The suite that asked for a record, and how many records a run of it has."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*(\+[a-z]+[0-9]+)*$")
    protocol: Name | None
    digest: Digest
    records: Annotated[int, Field(ge=1)]


class ModelFacts(Strict):
    """The model: ``source`` loads it again; ``digest`` hashes its weights."""

    name: str = Field(min_length=1)
    source: str
    digest: Name
    parameters: Count | None
    preprocessing: dict[str, Any]


class TaskFacts(Strict):
    """The task: ``revision`` pins the data, ``prompts_digest`` class names and templates.

    In retrieval the captions of the samples take the place of class names.
    """

    name: str = Field(min_length=1)
    data: str
    revision: str
    split: str | None
    convert_rgb: bool
    n_classes: Annotated[int, Field(ge=2)]
    templates: list[str]
    prompts_digest: Digest
    metric: Literal["zero-shot classification", "retrieval"]


class ThreatFacts(Strict):
    """The threat model, with every parameter of the attack that changes its output."""

    attack: Name
    norm: Literal["linf", "l2", "levenshtein"]
    eps: str = Field(pattern=r"^[0-9]{1,6}/[1-9][0-9]{0,5}$")
    surface: Literal["native", "model"]
    parameters: Scalars
    block: Count | None

    @property
    def name(self) -> str:
        """As ``ThreatModel.name``."""
        suffix = " model" if self.surface == "model" else ""
        return f"{self.attack} {self.norm} {self.eps}{suffix}"

    @property
    def edits(self) -> int:
        """The most characters of a class name that the attacker may change."""
        edits = self.parameters.get("edits", 0)
        return edits if isinstance(edits, int) else 0

    @property
    def ball(self) -> str:
        """What the attacker may do, whatever the attack: "linf 8/255", "linf 8/255 + 1 edit"."""
        both = self.norm != "levenshtein" and "edits" in self.parameters
        plus = f" + {self.edits} edit{'s' * (self.edits != 1)}" if both else ""
        return f"{self.norm} {self.eps}{plus}{' model' if self.surface == 'model' else ''}"


class Sample(_Sparse):
    """The truth about one sample.

    ``broken_by`` names the attack that broke it. ``unconfirmed`` is true where a fresh pass did not
    agree that it did: such a sample counts as broken, and the record carries a flag. Passes are
    the attack's; the one clean pass is not counted.

    In retrieval ``label`` is the gallery's place of the image's first caption, ``prediction`` the
    place of the caption that was ranked first, or ``label`` for any matching one; ``ranks`` are
    there. ``edit`` is what a text attack that broke the sample made of its class's name:
    the name itself where a pass was wrong without an edit.
    """

    id: str
    label: Count
    prediction: Count
    clean_correct: bool
    robust: bool
    broken_by: str | None
    unconfirmed: bool
    forward: Count
    backward: Count
    ranks: Ranks | None = None
    edit: NameEdit | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.clean_correct != (self.label == self.prediction):
            raise ValueError(f"sample {self.id}: clean_correct contradicts its prediction")
        if self.robust and not self.clean_correct:
            raise ValueError(f"sample {self.id}: robust, but wrong on the clean image")
        if (self.broken_by is not None) != (self.clean_correct and not self.robust):
            raise ValueError(f"sample {self.id}: broken_by contradicts robust")
        if self.unconfirmed and self.broken_by is None:
            raise ValueError(f"sample {self.id}: unconfirmed, but nothing broke it")
        if self.edit is not None and self.broken_by is None:
            raise ValueError(f"sample {self.id}: an edit, but nothing broke it")
        if self.ranks is not None:
            clean, attacked = self.ranks.image
            standing = self.clean_correct and attacked == 1
            if self.clean_correct != (clean == 1) or standing != (self.robust or self.unconfirmed):
                raise ValueError(f"sample {self.id}: its ranks contradict its verdicts")
        return self


class Results(_Sparse):
    """Aggregates, recomputed from the samples on every read. Intervals are Wilson's at 95%.

    In retrieval the accuracies are the image-to-text recalls at 1, and ``recalls`` has them all.
    """

    n: Count
    clean_accuracy: Share
    clean_interval: tuple[Share, Share]
    robust_accuracy: Share
    robust_interval: tuple[Share, Share]
    forward_per_sample: float
    backward_per_sample: float
    recalls: Recalls | None = None


class Flag(Strict):
    """A reason to doubt the result: a code, and a sentence with the figures."""

    code: Name
    detail: str


class Environment(_Sparse):
    """Where a record was made: recorded, not part of its identity.

    Device, threads and batch size are those of each of the ``processes``, where there were several.
    """

    versions: dict[str, str]
    python: str
    platform: str
    device: str
    threads: Count
    batch_size: Count
    git_revision: str | None
    processes: Annotated[int, Field(ge=2)] | None = None


class Record(_Sparse):
    """The result of one (model, task, threat model). No ``results`` unless ``status`` is ok.

    ``seconds`` are those of the whole evaluation, ``model_seconds`` those of the attack's passes
    through the model, where the attack measures them; of several processes, their sum.
    ``black_box`` is the check of robust samples without gradients; None: not made.
    """

    schema_version: Literal[1, 2]
    identity: Digest
    status: Literal["ok", "error"]
    error: str | None
    suite: SuiteFacts | None
    model: ModelFacts
    task: TaskFacts
    threat: ThreatFacts
    seed: Count
    precision: Literal["float32"]
    sample_ids_digest: Digest
    results: Results | None
    black_box: BlackBox | None = None
    flags: list[Flag]
    notes: list[str]
    environment: Environment
    seconds: float = Field(ge=0, le=1e9)
    model_seconds: float | None = Field(default=None, ge=0, le=1e9)
    created: str
    samples: list[Sample]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.identity != identity_of(self):
            raise ValueError("its identity does not follow from its configuration")
        if self.status == "error":
            if self.error is None or self.results is not None:
                raise ValueError("a failed record has an error and no results")
            return self
        if self.error is not None:
            raise ValueError("a finished record has no error")
        if not self.samples:
            raise ValueError("it has no samples")
        ids = [sample.id for sample in self.samples]
        if len(set(ids)) != len(ids):
            raise ValueError("a sample occurs twice")
        if digest_of(ids) != self.sample_ids_digest:
            raise ValueError("its samples are not those of its configuration")
        if any(max(s.label, s.prediction) >= self.task.n_classes for s in self.samples):
            raise ValueError("a label or prediction is not one of the classes")
        gallery = self.task.n_classes if self.task.metric == "retrieval" else None
        require_ranks(self.samples, gallery)
        self._check_edits()
        if self.black_box and self.black_box.drawn > sum(s.robust for s in self.samples):
            raise ValueError("its check drew more samples than are robust")
        if self.results != aggregate(self.samples):
            raise ValueError("its aggregates do not follow from its samples")
        return self

    def _check_edits(self) -> None:
        text_only = self.threat.norm == "levenshtein"
        if text_only and self.threat.eps != f"{self.threat.edits}/1":
            raise ValueError("its radius is not its number of edits")
        for sample in self.samples:
            if sample.edit is not None and not sample.edit.within(self.threat.edits):
                raise ValueError(f"sample {sample.id}: its class's name has too many edits")
            if text_only and (sample.edit is not None) != (sample.broken_by is not None):
                raise ValueError(f"sample {sample.id}: broken without an edit, or the reverse")

    @property
    def robust_accuracy(self) -> float:
        """Robust accuracy in [0, 1]. Raises InputError if the evaluation failed."""
        return self._results().robust_accuracy

    @property
    def clean_accuracy(self) -> float:
        """Clean accuracy in [0, 1]. Raises InputError if the evaluation failed."""
        return self._results().clean_accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the robust accuracy. Raises InputError on failure."""
        return self._results().robust_interval

    def save(self, path: str | Path) -> None:
        """Write the record as ``run`` does: the same bytes, whole or not at all.

        An existing file is replaced. Raises StorageError if the file cannot be written.
        """
        write_atomically(Path(path), self.to_text())

    def to_text(self) -> str:
        """The canonical text of a record: JSON, one line a sample, closed by a hash of the rest."""
        body = self.model_dump(mode="json")
        samples = body.pop("samples")
        head = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False)
        lines = ",\n".join(f"  {json.dumps(s, ensure_ascii=False)}" for s in samples)
        return seal(f'{head[:-2]},\n "samples": [\n{lines}\n ]')

    def _results(self) -> Results:
        if self.results is None:
            raise InputError(f"The evaluation failed, so there is no accuracy: {self.error}")
        return self.results


def seal(text: str) -> str:
    """A JSON object whose end is open, closed by a hash of what stands before."""
    return f'{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def unseal(text: str) -> str:
    """The JSON object of a sealed text without its hash, which is not checked.

    The caller writes what it read again and compares the texts: that checks every byte. Raises
    KeyError without a hash, and what ``json.loads`` raises.
    """
    body = json.loads(text)
    del body["sha256"]
    return json.dumps(body)


def digest_of(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identity_of(record: Record) -> str:
    """The identity that a record's own configuration leads to."""
    return identity(
        version=record.schema_version,
        suite=record.suite,
        model=record.model,
        task=record.task,
        threat=record.threat,
        seed=record.seed,
        precision=record.precision,
        sample_ids_digest=record.sample_ids_digest,
    )


def identity(
    *,
    version: int = SCHEMA_VERSION,
    suite: SuiteFacts | None,
    model: ModelFacts,
    task: TaskFacts,
    threat: ThreatFacts,
    seed: int,
    precision: str,
    sample_ids_digest: str,
) -> str:
    """Hash what changes a verdict: not the batch size, device, versions, or a model's name."""
    return digest_of(
        {
            "schema": version,
            "suite": suite.model_dump() if suite else None,
            "model": [model.digest, model.preprocessing],
            "task": [
                task.revision,
                task.split,
                task.convert_rgb,
                task.prompts_digest,
                task.metric,
            ],
            "samples": sample_ids_digest,
            "threat": threat.model_dump(),
            "seed": seed,
            "precision": precision,
        }
    )


def aggregate(samples: list[Sample]) -> Results:
    """The figures that follow from per-sample truth."""
    n = len(samples)
    clean = sum(sample.clean_correct for sample in samples)
    robust = sum(sample.robust for sample in samples)
    return Results(
        n=n,
        clean_accuracy=clean / n,
        clean_interval=wilson(clean, n),
        robust_accuracy=robust / n,
        robust_interval=wilson(robust, n),
        forward_per_sample=sum(sample.forward for sample in samples) / n,
        backward_per_sample=sum(sample.backward for sample in samples) / n,
        recalls=recalls_of(samples),
    )
