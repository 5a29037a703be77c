"""Data sets in the WebDataset layout of CLIP_benchmark: tar shards, class names and templates.

``SPLIT/nshards.txt`` says how many shards ``SPLIT/0.tar``, ``SPLIT/1.tar``, ... there are. A sample
is two members of a shard: ``KEY.cls`` (its label, in digits), or for retrieval ``KEY.txt`` (a
caption a line), and ``KEY.webp`` (or png, jpg, ...). ``shard.COMPANIONS`` may lie beside them; any
other member is an error, so that no sample is left out for its name. ``classnames.txt`` and
``zeroshot_classification_templates.txt`` ({c} stands for the class) are at the root.
(LAION-AI/CLIP_benchmark, webdataset_builder.py: keys are s0000000, s0000001, ... counted over all
shards; a shard is full at a count or at a size.) Nothing is extracted or executed.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from mmtard_bench.data.base import Dataset, LazyLabels, Pixels, captions_in, few, local_path
from mmtard_bench.data.decode import decode
from mmtard_bench.data.shard import Shard, read_shard
from mmtard_bench.errors import InputError
from mmtard_bench.files import lines_in, read_text
from mmtard_bench.hub import download, resolve_commit
from mmtard_bench.types import Task

_MOST_SHARDS = 100_000


class WebDataset:
    """Samples in tar shards; implements ``Dataset``.

    ``file`` gives a file of the layout by name, downloading it if it must. Where the task states
    how many samples there are, their ids follow, and only the shards of those that are used are
    asked for; else all are.
    """

    def __init__(self, task: Task, file: Callable[[str], Path], revision: str | None) -> None:
        self.task = task
        self.file = file
        self.split = task.split or "test"
        self._revision = revision
        self._shards: dict[int, Shard] = {}
        self._where: dict[str, int] = {}

    @cached_property
    def revision(self) -> str:
        """The commit; of a folder, a hash of its samples, however they are spread over shards."""
        if self._revision is not None:
            return self._revision
        sha = hashlib.sha256()
        for key in sorted(self.ids):
            shard = self._shards[self._shard_of(key)]
            digest = hashlib.sha256(shard.image(key)).hexdigest()
            sha.update(f"{key} {shard.places[key].text} {digest}\n".encode())
        return f"sha256:{sha.hexdigest()}"

    @cached_property
    def ids(self) -> Sequence[str]:
        """The keys: unique over all shards, so that it does not matter how many there are."""
        if self.task.samples is not None:
            return [f"s{i:07d}" for i in range(self.task.samples)]
        return [key for i in range(self._count) for key in self._shard(i).places]

    @property
    def labels(self) -> Sequence[int]:
        return LazyLabels(len(self.ids), self.label, self._known_labels)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The lines of ``classnames.txt``."""
        names = self._lines("classnames.txt", optional=True)
        if "" in names:
            raise InputError(
                f"{self.task.data}: line {names.index('') + 1} of classnames.txt is empty; give "
                "the names with classes = [...] in the task."
            )
        return tuple(names)

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """The lines of ``zeroshot_classification_templates.txt``, with {} for the class."""
        lines = self._lines("zeroshot_classification_templates.txt", optional=True)
        for line in lines:
            if line.count("{c}") != 1 or line.count("{") != 1 or line.count("}") != 1:
                raise InputError(
                    f"{self.task.data}: the template '{line}' needs exactly one {{c}} for the "
                    "class and no other braces; give templates = [...] in the task."
                )
        return tuple(line.replace("{c}", "{}") for line in lines)

    def image(self, index: int) -> Pixels:
        key = self.ids[index]
        data = self._shards[self._shard_of(key)].image(key)
        what = f"{self.task.data}: the image of sample '{key}'"
        return decode(data, what, convert_rgb=self.task.convert_rgb)

    def label(self, index: int) -> int:
        """The label of a sample: asks for its shard."""
        return int(self._text(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample: asks for its shard."""
        what = f"{self.task.data}: sample '{self.ids[index]}'"
        return captions_in([self._text(index)], what)

    def _known_labels(self) -> Iterator[tuple[str, int]]:
        for shard in self._shards.values():
            yield from ((key, int(place.text)) for key, place in shard.places.items())

    def _text(self, index: int) -> str:
        key = self.ids[index]
        return self._shards[self._shard_of(key)].places[key].text

    def _lines(self, name: str, *, optional: bool = False) -> list[str]:
        path = self.file(name)
        if optional and not path.exists():
            return []
        try:
            return lines_in(read_text(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.task.data}: {name} cannot be read: {error}.") from error

    @cached_property
    def _count(self) -> int:
        name = f"{self.split}/nshards.txt"
        text = (self._lines(name) or [""])[0].strip()
        if not re.fullmatch(r"\d{1,6}", text) or not 1 <= int(text) <= _MOST_SHARDS:
            raise InputError(f"{self.task.data}: {name} says '{text[:40]}'; expected a number.")
        count = int(text)
        if self._revision is None:
            here = {path.name for path in self.file(self.split).glob("*.tar")}
            left = sorted(here.difference(f"{number}.tar" for number in range(count)))
            if left:
                raise InputError(
                    f"{self.task.data}: {name} says {count}, but the shards {few(left)} are there "
                    "too. Correct the number, or remove them."
                )
        return count

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            name = f"{self.split}/{number}.tar"
            texts = "txt" if self.task.metric == "retrieval" else "cls"
            what = f"{self.task.data}: the shard {name}"
            shard = read_shard(self.file(name), what, texts=texts)
            for key in shard.places:
                if self._where.setdefault(key, number) != number:
                    raise InputError(f"{self.task.data}: two shards hold the sample '{key}'.")
            self._shards[number] = shard
            if self.task.samples is not None:
                self._require_stated(shard, is_last=number == self._count - 1)
        return self._shards[number]

    def _shard_of(self, key: str) -> int:
        """The shard of a sample, read. Shards hold consecutive keys: a guess is soon right."""
        first, last = 0, self._count - 1
        number = _number(key)
        while key not in self._where and first <= last and number is not None:
            guess = number // self._shard_size if self._shard_size else 0
            guess = min(max(guess, first), last)
            numbers = [n for n in map(_number, self._shard(guess).places) if n is not None]
            if numbers and number < numbers[0]:
                last = guess - 1
            else:
                first = guess + 1
        if key not in self._where:
            raise InputError(
                f"{self.task.data} has no sample '{key}', though the task says that there are "
                f"{self.task.samples}; correct samples = ... in the task, or leave it out."
            )
        return self._where[key]

    @property
    def _shard_size(self) -> int:
        """Samples in a full shard: as the task says or, where it does not, as in the first."""
        return self.task.shard_samples or len(self._shard(0).places)

    def _require_stated(self, shard: Shard, *, is_last: bool) -> None:
        """See that a shard holds consecutive samples of those that the task states.

        The last ends where they do.
        """
        keys = sorted(shard.places)
        first = _number(keys[0]) if keys else None
        run = [f"s{i:07d}" for i in range(first or 0, (first or 0) + len(keys))]
        end = keys[-1] if keys else ""
        if keys != run or end > self.ids[-1] or (is_last and end != self.ids[-1]):
            raise InputError(
                f"{self.task.data}: a shard holds {len(keys)} samples, '{keys[0] if keys else ''}' "
                f"to '{end}', which do not follow from samples = {self.task.samples} in the task "
                f"('{self.ids[0]}' to '{self.ids[-1]}', counted without a gap); correct it, or "
                "leave it out."
            )


def _number(key: str) -> int | None:
    return int(key[1:]) if re.fullmatch(r"s\d{7,}", key) else None


def hub_repository(task: Task) -> tuple[str, str] | None:
    """The hub repository that a task's data is in, and the revision; None for a local folder."""
    scheme, _, where = task.data.partition(":")
    name, _, revision = where.partition("@")
    # A folder of that name is meant, unless a revision is named: a folder has none.
    local = not revision and Path(name).exists()
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not local
    return (name, revision) if scheme in ("wds", "hub") and on_hub else None


def open_webdataset(task: Task) -> Dataset:
    """Open ``wds:ORG/NAME[@REVISION]`` or ``wds:DIR``. Raises InputError."""
    repository = hub_repository(task)
    if repository is not None:
        name, revision = repository
        commit = resolve_commit(task.data, name, revision)

        def fetched(file: str) -> Path:
            return download(task.data, name, file, commit)

        return WebDataset(task, fetched, f"{name}@{commit}")
    folder = local_path(task.data.removeprefix("wds:"), task.data)
    if not folder.is_dir():
        raise InputError(
            f"{task.data}: there is no such folder; expected wds:DIR with test/nshards.txt and the "
            "shards in it, or wds:ORG/NAME[@REVISION] for a hub repository."
        )

    def found(file: str) -> Path:
        path = folder / file
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{task.data}: {file} is not a regular file; a pipe would never end.")
        return path

    return WebDataset(task, found, None)
