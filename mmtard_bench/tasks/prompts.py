"""The tokens of a task's prompts, and whether they differ for different names.

A tokenizer may cut prompts at its context, drop letter case or ignore accents, so that prompts of
different names have equal tokens. A model cannot tell such classes apart.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmtard_bench.errors import InputError, ModelError, shown
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.edits import plain
from mmtard_bench.records.schema import digest_of
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.types import require_templates

ENDING = " x"
"""A prompt whose tokens stay the same with this at its end fills the tokenizer's context."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of N names in T templates.

    ``tokens`` (N * T, ...) has the T prompts of the first name, then those of the second, and so
    on. ``alike``: groups of names, by index, with equal tokens in every template. ``blurred``: in
    how many templates some different names have equal tokens. ``full``: the rows of ``tokens`` that
    fill the context, where the tokenizer cuts longer prompts.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    tokens: Tensor
    alike: tuple[tuple[int, ...], ...]
    blurred: int
    full: frozenset[int]

    @cached_property
    def digest(self) -> str:
        """Hash of names, templates, and the tokens of every prompt."""
        tokens = self.tokens.contiguous()
        facts = [self.names, self.templates, tuple(tokens.shape), str(tokens.dtype)]
        return digest_of([*facts, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()])

    @property
    def context(self) -> int:
        """The number of tokens of a prompt."""
        return self.tokens[0].numel()

    @property
    def clashes(self) -> list[tuple[int, int]]:
        """The first two indices of each group of ``alike`` that has different names."""
        pairs = []
        for group in self.alike:
            first, *others = group
            other = next((i for i in others if self.names[i] != self.names[first]), None)
            if other is not None:
                pairs.append((first, other))
        return pairs


def prompts_of(clip: Clip, names: tuple[str, ...], templates: tuple[str, ...]) -> Prompts:
    """The prompts of some names as tokens, computed once per model. Raises InputError."""
    key = (names, templates)
    if key not in clip.cache.prompts:
        clip.cache.prompts[key] = _tokenise(clip, names, templates)
    found: Prompts = clip.cache.prompts[key]
    return found


def understood(clip: Clip, data: TaskData) -> TaskData:
    """The samples of a task, with notes on prompts that a model's tokenizer cuts or confuses.

    In retrieval, captions with equal tokens match each other's images.
    """
    prompts = prompts_of(clip, data.classes, data.templates)
    notes, matches = _notes(prompts), data.matches
    if data.task.metric == "retrieval" and prompts.alike:
        same = {place: group for group in prompts.alike for place in group}
        matches = tuple(
            tuple(dict.fromkeys(other for place in own for other in same.get(place, (place,))))
            for own in data.matches
        )
        count = sum(len(group) - 1 for group in prompts.alike)
        notes.append(
            f"{count} of {len(data.classes)} captions have the tokens of an earlier caption in "
            "this model's tokenizer, so each counts as a match of the other's images"
        )
    return data.prompted(notes, matches) if notes else data


def require_distinct(clip: Clip, data: TaskData) -> None:
    """Raise ModelError if different names have equal tokens in every template."""
    prompts = prompts_of(clip, data.classes, data.templates)
    clashes = prompts.clashes
    if not clashes:
        return
    count = len(prompts.templates)
    rows = {place * count + i for place in clashes[0] for i in range(count)}
    first, second = (prompts.names[place] for place in clashes[0])
    if rows <= prompts.full:
        why = f"they are cut at the context of {prompts.context} tokens; shorten the templates"
    elif plain(first) == plain(second):
        why = "the tokenizer does not see letter case or spaces; give names that differ otherwise"
    else:
        why = "the tokenizer does not know what differs; give names in words that it knows"
    more = f" ({len(clashes)} such groups)" if len(clashes) > 1 else ""
    raise ModelError(
        f"The model '{clip.name}' cannot tell the classes {first!r} and {second!r} of the task "
        f"'{data.task.name}' apart{more}: their prompts have equal tokens in every template, "
        f"because {why}."
    )


def _notes(prompts: Prompts) -> list[str]:
    notes = []
    twice = _twice(prompts.names)
    if twice:
        few = ", ".join(shown(name) for name in twice[:3])
        notes.append(
            f"{len(twice)} class names occur more than once ({few}); their logits are equal, and "
            "the lower label wins"
        )
    if prompts.full:
        notes.append(
            f"{len(prompts.full)} of {len(prompts.tokens)} prompts fill the model's context of "
            f"{prompts.context} tokens: whatever follows there is cut"
        )
    if prompts.blurred and not prompts.clashes:
        notes.append(
            f"in {prompts.blurred} of {len(prompts.templates)} templates different class names "
            "have equal tokens"
        )
    return notes


def _twice(names: Sequence[str]) -> list[str]:
    return [names[group[0]] for group in _groups(names)]


def _tokenise(clip: Clip, names: tuple[str, ...], templates: tuple[str, ...]) -> Prompts:
    require_templates(templates, "its data")
    texts = _fill(names, templates)
    tokens = clip.tokens(texts)
    flat = tokens.reshape(len(tokens), -1).contiguous()
    rows = [row.tobytes() for row in flat.numpy()]
    count = len(templates)
    blurred = sum(
        len(set(column)) < len(set(zip(names, column, strict=True)))
        for column in (rows[i::count] for i in range(count))
    )
    every = [tuple(rows[i : i + count]) for i in range(0, len(rows), count)]
    full = _full(clip, texts, flat)
    return Prompts(names, templates, tokens, tuple(_groups(every)), blurred, full)


def _fill(names: Iterable[str], templates: Sequence[str]) -> list[str]:
    return [template.replace("{}", name) for name in names for template in templates]


def _groups(values: Iterable[Hashable]) -> list[tuple[int, ...]]:
    """The places of equal values, of those that occur more than once."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        places[value].append(place)
    return [tuple(group) for group in places.values() if len(group) > 1]


def _full(clip: Clip, texts: Sequence[str], tokens: Tensor) -> frozenset[int]:
    """The rows of prompts whose tokens do not change when a word is added."""
    # Padding is a value that is repeated at the end; most prompts have some, and are not tried.
    padded = tokens[:, -1] == tokens[:, -2] if tokens.shape[1] > 1 else torch.zeros(len(tokens))
    tried = (~padded.bool()).nonzero().flatten().tolist()
    if not tried:
        return frozenset()
    try:
        longer = clip.tokens([texts[place] + ENDING for place in tried])
    except InputError:  # of a fixed list of prompts, say
        return frozenset()
    longer = longer.reshape(len(tried), -1)
    if longer.shape[1] != tokens.shape[1]:
        return frozenset()
    same = (longer == tokens[tried]).all(1).tolist()
    return frozenset(place for place, equal in zip(tried, same, strict=True) if equal)
