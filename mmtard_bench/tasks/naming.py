"""Check class names and labels: each label must get the name of its own class."""

import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from operator import index

from mmtard_bench.data.base import Dataset, LazyLabels, few
from mmtard_bench.data.manifest import Manifest
from mmtard_bench.errors import InputError
from mmtard_bench.tasks.catalogue import imagenet_classes
from mmtard_bench.types import Task

_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"\d+[\W_]+(?=[^\W\d_])")
"""A number before a class name: "10_bird", "001.Laysan_Albatross", but not "737-200"."""


def class_names(task: Task, dataset: Dataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of a task, one for each class of the data set, and notes on them.

    Raises InputError unless it is certain that each label gets the name of its own class.
    """
    own = tuple(dataset.class_names)
    classes = task.classes or own
    if not classes and task.label_column:
        raise InputError(
            f"{task.data} does not name its classes; give classes = [...] or classes_file = ... "
            "in the task, one name a label."
        )
    for count, whose in ((len(own), "the data set names"), (task.n_classes, "the task states")):
        if count and count != len(classes):
            raise InputError(
                f"{task.name}: the prompts are for {len(classes)} classes, but {whose} {count}; "
                "labels would name the wrong classes. Give one class name a label, in label order."
            )
    notes = _renamed(task, own, classes) if own and own != classes else ()
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        warnings.warn(
            f"{task.name}: class names occur more than once ({', '.join(twice[:5])}); their "
            "logits are equal, and the lower label wins.",
            stacklevel=2,
        )
    return classes, notes


def _renamed(task: Task, own: Sequence[str], classes: tuple[str, ...]) -> tuple[str, ...]:
    """A note on class names that differ from those of the data set.

    Raises InputError if a name may mean another class.
    """
    if classes == imagenet_classes():
        if not all(map(_WORDNET_ID.fullmatch, own)):
            raise InputError(
                f"{task.data}: ImageNet's class names are in the order of its WordNet ids, but the "
                f"classes of the data are called '{own[0]}' and so on, which may be in another "
                "order. Expected one folder a class, named like n01440764."
            )
        return ()
    labels: dict[str, set[int]] = defaultdict(set)
    for label, name in enumerate(own):
        for key in _keys(name):
            labels[key].add(label)
    called = [set().union(*(labels.get(key, ()) for key in _keys(name))) for name in classes]
    for label, meant in enumerate(called):
        if meant and label not in meant:
            raise InputError(
                f"{task.name}: the task calls the label {label} '{classes[label]}', but in "
                f"{task.data} this is '{own[label]}', and '{own[min(meant)]}' is the label "
                f"{min(meant)}. Give the names in the order of the data's labels "
                f"({few(own)}), or leave classes out to use the data's own."
            )
    others = [label for label, meant in enumerate(called) if not meant]
    if others:
        _require_numbers_in_order(task, own)
    renamed = few(f"'{own[label]}' is '{classes[label]}'" for label in others)
    return (f"The task's class names differ from the data's ({renamed}).",) if others else ()


def _keys(name: str) -> set[str]:
    """The forms by which names are compared: without case, punctuation, article and plural.

    A numbered name has forms with and without its number.
    """
    found = set()
    for part in {*name.split(","), *_NUMBER.sub("", name, count=1).split(",")}:
        text = re.sub(r"^(an?|the)[\W_]+", "", part.strip().casefold())
        found.add(re.sub(r"[\W_]+", "", text).removesuffix("s") or name)
    return found


def _require_numbers_in_order(task: Task, own: Sequence[str]) -> None:
    """Raise InputError for classes in the order 1, 10, 2: a list of names has 1, 2, 10."""
    alike = len({re.sub(r"\d+", "#", name) for name in own}) == 1
    if not alike and not all(map(_NUMBER.match, own)):
        return
    for before, after in pairwise(own):
        if [*map(int, re.findall(r"\d+", before))] > [*map(int, re.findall(r"\d+", after))]:
            raise InputError(
                f"{task.data}: the classes are numbered, and as text '{before}' comes before "
                f"'{after}', so the names that the task gives would be shifted. Write the numbers "
                "with leading zeros (01, 02, ... 10), or name the classes in the data."
            )


def labels_at(
    task: Task, dataset: Dataset, labels: Sequence[int], manifest: Manifest
) -> tuple[int, ...]:
    """The labels of the drawn samples as Python integers.

    Raises InputError for a label that is not a whole number, and if the number of labels differs
    from the number of samples.
    """
    if len(labels) != len(dataset.ids):
        raise InputError(
            f"{task.data} has {len(labels)} labels for {len(dataset.ids)} samples; expected one "
            "each."
        )
    drawn = [labels[i] for i in manifest.indices]
    try:
        return tuple(map(index, drawn))
    except TypeError as error:
        raise InputError(
            f"{task.data}: the labels are like {drawn[0]!r}; expected whole numbers from 0."
        ) from error


def check_labels(
    task: Task, dataset: Dataset, labels: Sequence[int], classes: Sequence[str]
) -> tuple[str, ...]:
    """Require that labels are class indices, for all samples whose labels are known.

    All labels are known, except for data whose files are fetched on demand. ``labels`` come from
    the data set, which may compute them on each access. Returns a note on classes without samples.
    Raises InputError for a label that is not a class index.
    """
    some = labels.known() if isinstance(labels, LazyLabels) else None
    pairs = zip(dataset.ids, labels, strict=True) if some is None else some
    first: dict[int, str] = {}
    for sample, label in pairs:
        first.setdefault(label, sample)
    count = len(classes)
    wrong = [label for label in first if label not in range(count)]
    if wrong:
        hint = " They seem to count from 1: subtract 1 from each."
        raise InputError(
            f"{task.data}: sample '{first[wrong[0]]}' has the label {wrong[0]}, but there are "
            f"{count} classes; labels go from 0 to {count - 1}."
            f"{hint if min(first) == 1 and max(first) == count else ''}"
        )
    absent = [name for label, name in enumerate(classes) if label not in first]
    if some is not None or not absent:
        return ()
    if not dataset.class_names and first and min(first) == 1 and max(first) == count - 1:
        warnings.warn(
            f"{task.data}: no sample has the label 0, '{classes[0]}'. If its labels count from 1, "
            "every sample is scored as the class after its own: subtract 1 from each.",
            stacklevel=2,
        )
    return (f"{len(absent)} of {count} classes have no sample in the data ({few(absent)}).",)
