"""Parquet repositories of the hub: the same samples as of the whole, from the files they are in."""

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest

import mmtard_bench as mb
from mmtard_bench.data import hub_parquet
from mmtard_bench.data.decode import decode
from mmtard_bench.data.table import load_table
from mmtard_bench.tasks.samples import (
    TaskData,
    find_task,
    load_manifest,
    load_task,
    open_data,
)
from mmtard_bench.types import Task
from tests.cli.test_bad_input import rgb
from tests.hub import COMMIT, Fault, Files, hub

PER_FILE = 4
NAMES = ["cat", "dog", "hen"]
IMAGES = [rgb(i, (96, 96)) for i in range(3 * PER_FILE)]
PLACES = [f"{i:08d}" for i in range(12)]


def rows(numbers: range, ids: list[object] | None, label: object) -> bytes:
    """A parquet file with these samples."""
    columns = {"image": [{"bytes": IMAGES[i], "path": None} for i in numbers]}
    columns["label"] = [i % len(NAMES) for i in numbers]
    features = {"image": datasets.Image(), "label": label}
    if ids is not None:
        columns["id"] = [ids[i] for i in numbers]
        features["id"] = datasets.Value("int64" if isinstance(ids[0], int) else "string")
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(buffer)
    return buffer.getvalue()


def repository(
    shards: int = 3, ids: list[object] | None = None, label: object = None, **more: bytes
) -> dict[str, Files]:
    """Twelve samples under "test" in as many files, four under "train"."""
    label = label or datasets.ClassLabel(names=NAMES)
    files = {"data/train-00000-of-00001.parquet": rows(range(PER_FILE), ids, label)}
    full = len(IMAGES) // shards
    for i in range(shards):
        name = f"data/test-{i:05d}-of-{shards:05d}.parquet"
        files[name] = rows(range(i * full, (i + 1) * full), ids, label)
    return {"datasets:me/pets": files | more}


def task(split: str | None = "test", **changes: object) -> Task:
    found = find_task("hub:me/pets")
    return Task(**{**vars(found), "split": split, **changes})


def load(n: int | None = None, seed: int = 0, split: str | None = "test") -> TaskData:
    return load_task(task(split), n=n, seed=seed)


def seen(data: TaskData) -> tuple[object, ...]:
    """All that an evaluation gets of a task."""
    pixels = [data.pixels(row).tobytes() for row in range(len(data.labels))]
    return data.revision, data.classes, data.manifest, data.labels, pixels


def downloaded(asked: list[str]) -> list[str]:
    """The parquet files that were asked for as a whole: "test-00000", ..."""
    whole = [line for line in asked if line.startswith("GET") and line.endswith(".parquet")]
    return [line.rpartition("/")[2].partition("-of")[0] for line in whole]


def read_in_parts(asked: list[str], file: str) -> int:
    """Bytes of a file that were asked for in parts."""
    spans = [line.rpartition("bytes=")[2].split("-") for line in asked if f"{file}-of" in line]
    return sum(int(last) - int(first) + 1 for first, last in filter(lambda s: len(s) == 2, spans))


@pytest.fixture
def whole(monkeypatch):
    """Load all files of all splits, as of other kinds of repositories."""

    def load_whole(n: int | None = None, split: str | None = "test") -> TaskData:
        with monkeypatch.context() as patched:
            patched.setattr(hub_parquet, "_parquet_files", lambda *_: None)
            place = hub_parquet.index_place("me/pets", COMMIT, split)
            place.unlink(missing_ok=True)
            data = load(n, split=split)
            assert not place.exists()
            return data

    return load_whole


@pytest.fixture
def offline(monkeypatch):
    def disconnect() -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    return disconnect


TWINS = ["a", "b", "a", "c", "d", "a", "e", "f", "g", "b", "h", "i"]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (None, PLACES),
        ([*range(70, 82)], [*map(str, range(70, 82))]),
        (TWINS, ["a", "b", "a#2", "c", "d", "a#3", "e", "f", "g", "b#2", "h", "i"]),
    ],
    ids=["no ids", "numbers", "twins"],
)
def test_samples_are_those_of_the_whole(online, whole, shards, ids, expected):
    with hub(repository(shards, ids)) as endpoint:
        online(endpoint)
        assert list(open_data(task()).ids) == expected
        by_file, everything = load(), whole()
        assert seen(by_file) == seen(everything)
        assert by_file.revision == f"me/pets@{COMMIT}"
        assert by_file.classes == tuple(NAMES)
        assert seen(load(5)) == seen(whole(5))


def test_only_files_with_a_sample_in_use_are_downloaded(online, offline):
    asked: list[str] = []
    files = repository()
    with hub(files, asked=asked) as endpoint:
        online(endpoint)
        (index,) = load_manifest(task(), n=1, seed=0).indices
        assert downloaded(asked) == []
        used, first, last = index // PER_FILE, *(i for i in range(3) if i != index // PER_FILE)
        data = load(1)
        assert downloaded(asked) == [f"test-{used:05d}"]
        for name, content in files["datasets:me/pets"].items():
            file = name.removeprefix("data/").partition("-of")[0]
            assert read_in_parts(asked, file) < 1.3 * 2**16 < len(content) * 0.8, (
                name,
                len(content),
            )
        # The index is there: nothing is read in parts any more.
        asked.clear()
        everything = load()
        assert sorted(downloaded(asked)) == [f"test-{first:05d}", f"test-{last:05d}"]
        assert not any("bytes=" in line for line in asked)
    offline()
    assert seen(load(1)) == seen(data)
    assert seen(load()) == seen(everything)


def test_offline_a_file_that_was_not_fetched_is_a_sentence(online, offline):
    with hub(repository()) as endpoint:
        online(endpoint)
        load(1)
    offline()
    for split in ("test", "train"):
        with pytest.raises(mb.InputError, match=r"me/pets: it is not in the cache.*HF_HUB_OFFLINE"):
            load(split=split)


def test_what_was_fetched_as_a_whole_is_enough_offline(online, whole, offline):
    """Version 0.1 did that."""
    with hub(repository()) as endpoint:
        online(endpoint)
        before = whole()
    offline()
    assert seen(load()) == seen(before)


def test_a_single_split_needs_no_name(online):
    files = repository()["datasets:me/pets"]
    test = {name: data for name, data in files.items() if "test" in name}
    with hub({"datasets:me/pets": test}) as endpoint:
        online(endpoint)
        assert load(split=None).manifest == load().manifest


def test_a_split_that_is_not_there_is_a_sentence(online):
    asked: list[str] = []
    with hub(repository(), asked=asked) as endpoint:
        online(endpoint)
        for split in ("validation", None):
            with pytest.raises(mb.InputError, match=r"has the splits train, test; .*split = "):
                load(split=split)
        assert not any(".parquet" in line and "GET" in line for line in asked)


def test_a_column_that_is_not_there_is_a_sentence(online):
    asked: list[str] = []
    with hub(repository(), asked=asked) as endpoint:
        online(endpoint)
        for wrong in ({"image_column": "img"}, {"label_column": "fine"}):
            with pytest.raises(mb.InputError, match=r"no column '(img|fine)'; it has image, label"):
                load_task(task(**wrong), n=1, seed=0)
        assert downloaded(asked) == []


CARD = b"""---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': wren, '1': teal, '2': kite}}}}
  splits:
  - {name: train, num_examples: 4}
  - {name: test, num_examples: ROWS}
---
"""


def test_columns_are_as_the_repository_states_them(online, whole):
    card = {"README.md": CARD.replace(b"ROWS", b"12")}
    with hub(repository(label=datasets.Value("int32"), **card)) as endpoint:
        online(endpoint)
        assert load().classes == ("wren", "teal", "kite")
        assert seen(load()) == seen(whole())


def test_columns_not_stated_are_those_of_the_first_file_of_all(online, whole):
    """As the library has it, where only one split's files name the classes."""
    files = repository()["datasets:me/pets"]
    bare = repository(label=datasets.Value("int64"))["datasets:me/pets"]
    mixed = {name: (files if "train" in name else bare)[name] for name in files}
    with hub({"datasets:me/pets": mixed}) as endpoint:
        online(endpoint)
        assert load().classes == tuple(NAMES)
        assert seen(load()) == seen(whole())


def test_a_repository_that_leaves_columns_out_is_loaded_as_a_whole(online, whole):
    card = b"""---
configs:
- config_name: default
  columns: [image, label]
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
---
"""
    with hub(repository(ids=TWINS, **{"README.md": card})) as endpoint:
        online(endpoint)
        assert list(open_data(task()).ids) == PLACES
        assert seen(load()) == seen(whole())


def test_a_repository_that_lacks_rows_is_a_sentence(online):
    card = {"README.md": CARD.replace(b"ROWS", b"13")}
    with hub(repository(**card)) as endpoint:
        online(endpoint)
        for _ in range(2):
            with pytest.raises(mb.InputError, match=r"split 'test' has 13 rows.*files hold 12"):
                load()


GATED = {"X-Error-Code": "GatedRepo"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(503, path="test-00001"), ["could not be reached", "503", "same command again"]),
        (Fault("close", path="test-00001"), ["could not be reached", "RemoteProtocolError"]),
        (Fault("short", path="test-00001"), ["could not be reached"]),
        (Fault("html", path="test-00001"), ["test-00001-of-00003.parquet is no whole parquet"]),
        (Fault("wrong", path="test-00001"), ["test-00001-of-00003.parquet is no whole parquet"]),
        (Fault(403, path="test-00001", headers=GATED), ["gated", "hf auth login"]),
        (Fault(429, path="test-00001", headers={"Retry-After": "999"}), ["limits the rate"]),
        (Fault("wrong", path="test-00001", whole=True), ["test-00001", "checksum"]),
        (Fault("wrong", path="README.md"), ["README.md", "checksum"]),
    ],
    ids=lambda value: f"{value.how} {value.path}" if isinstance(value, Fault) else "",
)
def test_failures(online, naps, fault, words):
    faults = [fault]
    with hub(repository(**{"README.md": b"# Pets\n" * 99}), faults=faults) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError) as caught:
            load()
        said = str(caught.value)
        assert said.startswith("hub:me/pets: ")
        for word in words:
            assert word in said, said
        faults.clear()
        assert len(load().labels) == 12


def test_a_file_that_is_cut_is_a_sentence(online):
    for size in (100_000, 3, 0):
        files = repository()
        name = "data/test-00001-of-00003.parquet"
        files["datasets:me/pets"][name] = files["datasets:me/pets"][name][:size]
        with hub(files) as endpoint:
            online(endpoint)
            with pytest.raises(mb.InputError, match=r"test-00001.*is no whole parquet file") as e:
                load()
            assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["shards"].pop(),
        lambda index: index["columns"].update(label={"_type": "Nothing"}),
        lambda index: index.update(columns={"image": 3}),
        lambda index: index["shards"][0].update(rows=-4),
        lambda index: index.clear(),
        None,
    ],
)
def test_a_damaged_index_is_made_again(online, change):
    with hub(repository(ids=TWINS)) as endpoint:
        online(endpoint)
        before = seen(load())
        path = hub_parquet.index_place("me/pets", COMMIT, "test")
        good = path.read_text()
        if change is None:
            path.write_text(good[:-9])
        else:
            index = json.loads(good)
            change(index)
            path.write_text(json.dumps(index))
        assert seen(load()) == before
        assert path.read_text() == good


@pytest.mark.parametrize(
    "change",
    [
        lambda index: [s.update(rows=r) for s, r in zip(index["shards"], (3, 5, 4), strict=True)],
        lambda index: index.update(names=TWINS[::-1]),
    ],
)
def test_an_index_that_is_not_of_these_files_is_found(online, change):
    """What is read in parts has no checksum; a file that is used has one."""
    with hub(repository(ids=TWINS)) as endpoint:
        online(endpoint)
        before = seen(load())
        path = hub_parquet.index_place("me/pets", COMMIT, "test")
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))
        with pytest.raises(mb.InputError, match=r"4 rows, and its index.*same command again"):
            load()
        assert seen(load()) == before


def test_a_file_that_is_damaged_in_the_cache_is_fetched_again(online, tmp_path):
    with hub(repository()) as endpoint:
        online(endpoint)
        before = seen(load())
        (link,) = (tmp_path / "hub").rglob("test-00001*")
        link.resolve().write_bytes(link.read_bytes()[:9999])
        with pytest.raises(mb.InputError, match=r"test-00001.* checksum.*same command again"):
            load()
        assert seen(load()) == before


def test_threads_open_a_file_once(online, monkeypatch):
    opened: list[str] = []

    def load_slowly(task: Task, builder: str, **arguments: object) -> object:
        opened.append(builder)
        time.sleep(0.1)
        return load_table(task, builder, **arguments)

    monkeypatch.setattr(hub_parquet, "load_table", load_slowly)
    with hub(repository()) as endpoint:
        online(endpoint)
        dataset = open_data(task())
        with ThreadPoolExecutor(6) as pool:
            images = list(pool.map(dataset.image, range(12)))
    assert len(opened) == 3
    for i, image in enumerate(images):
        assert np.array_equal(image, decode(IMAGES[i], "x", convert_rgb=False))


def test_other_files_are_loaded_as_a_whole(online, offline):
    files = {f"test/{NAMES[i % 3]}/{i}.png": IMAGES[i] for i in range(6)}
    with hub({"datasets:me/pets": files}) as endpoint:
        online(endpoint)
        data = load()
        assert (data.classes, sorted(data.labels)) == (tuple(NAMES), [0, 0, 1, 1, 2, 2])
    offline()
    assert seen(load()) == seen(data)


@pytest.mark.parametrize(
    "names",
    [
        ("tower/1.png", "train_station/2.png", "train_station/3.png"),
        ("a.parquet", "test_b.parquet"),
    ],
)
def test_files_that_split_words_leave_out_are_named(online, names):
    table = rows(range(2), None, datasets.ClassLabel(names=NAMES))
    files = {name: IMAGES[0] if name.endswith("png") else table for name in names}
    with hub({"datasets:me/pets": files}) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError, match=rf"1 of its files are in no split .{names[0]}"):
            load(split=None)


def test_a_card_may_leave_files_out(online):
    card = b"""---
configs:
- config_name: default
  data_files:
  - {split: test, path: data/test-*}
---
"""
    with hub(repository(**{"README.md": card})) as endpoint:
        online(endpoint)
        assert len(load().labels) == 12


def test_files_that_name_the_classes_in_another_order_are_refused(online):
    files = repository()["datasets:me/pets"]
    swapped = repository(label=datasets.ClassLabel(names=NAMES[::-1]))["datasets:me/pets"]
    name = "data/test-00002-of-00003.parquet"
    with hub({"datasets:me/pets": files | {name: swapped[name]}}) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError, match=r"test-00002.* name the classes differently"):
            load(1)


def test_labels_of_a_file_are_checked_even_of_samples_that_are_not_drawn(online):
    wrong = repository(shards=1, label=datasets.Value("int64"))
    with hub(wrong) as endpoint:
        online(endpoint)
        for seed in range(3):
            with pytest.raises(mb.InputError, match="has the label 2, but there are 2 classes"):
                load_task(task(classes=("cat", "dog")), n=1, seed=seed)


def test_a_repository_reads_no_file_of_this_machine(online, tmp_path):
    (tmp_path / "local.png").write_bytes(IMAGES[0])
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    row = {"image": {"bytes": None, "path": str(tmp_path / "local.png")}, "label": 0}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row], schema=features.arrow_schema), buffer
    )
    lines = f'{{"image": "{tmp_path}/local.png", "label": 0}}\n'.encode()
    for file in ({"test.parquet": buffer.getvalue()}, {"test.jsonl": lines}):
        with hub({"datasets:me/pets": file}) as endpoint:
            online(endpoint)
            data = load_task(task(classes=tuple(NAMES)), n=1, seed=0)
            with pytest.raises(mb.InputError, match="Only bytes in the data are read"):
                data.pixels(0)


def test_code_in_a_repository_is_refused(online):
    with hub(repository(**{"pets.py": b"raise SystemExit('run')"})) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError, match="scripts are no longer supported"):
            load()
