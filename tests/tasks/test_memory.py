"""Data in memory, saved to disk, and with names for labels."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import mmtard_bench as mb
from mmtard_bench.cli import main
from mmtard_bench.evaluation.sources import suite_of
from mmtard_bench.tasks import suites
from mmtard_bench.tasks.samples import load_task

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
NAMES = ["cat", "dog", "dog", "cat", "bird", "dog"]
CLASSES = ["dog", "cat", "bird"]
NUMBERS = [1, 0, 0, 1, 2, 0]


pytestmark = pytest.mark.usefixtures("own")


def loaded(task):
    data = load_task(task, n=None, seed=0)
    rows = sorted(range(len(data.labels)), key=lambda row: data.manifest.ids[row])
    return [data.classes[data.labels[row]] for row in rows], [data.pixels(row) for row in rows]


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        torch.tensor(IMAGES),
        torch.tensor(IMAGES).permute(0, 3, 1, 2),
        list(IMAGES),
        [Image.fromarray(image) for image in IMAGES],
    ],
    ids=["last", "tensor", "first", "list", "pillow"],
)
@pytest.mark.parametrize("labels", [NAMES, NUMBERS, np.array(NUMBERS), torch.tensor(NUMBERS)])
def test_every_form_is_one_data_set(images, labels):
    task = mb.task_of("mine", images, labels, classes=CLASSES)
    names, pixels = loaded(task)
    assert names == NAMES
    assert np.array_equal(np.stack(pixels), IMAGES)
    assert task.data == mb.task_of("mine", IMAGES, NAMES, classes=CLASSES).data


def test_what_differs_is_another_data_set():
    task = mb.task_of("mine", IMAGES, NAMES, classes=CLASSES)
    changed = IMAGES.copy()
    changed[3, 1, 1, 1] ^= 1
    others = [
        mb.task_of("mine", changed, NAMES, classes=CLASSES),
        mb.task_of("mine", IMAGES, [*NAMES[:5], "cat"], classes=CLASSES),
        mb.task_of("mine", IMAGES, NUMBERS, classes=["dog", "cat", "fish"]),
        mb.task_of("mine", IMAGES.transpose(0, 2, 1, 3), NAMES, classes=CLASSES),
    ]
    assert len({task.data, *(other.data for other in others)}) == 5
    record = mb.evaluate("tiny-clip", task=task, threat="pgd-1", eps="1/255")
    assert record.task.revision.startswith("sha256:")


def test_a_later_change_of_the_images_changes_nothing():
    images = IMAGES.copy()
    task = mb.task_of("mine", images, NAMES, classes=CLASSES)
    images[:] = 0
    assert np.array_equal(np.stack(loaded(task)[1]), IMAGES)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES / 255, NAMES, "float64.*expected images of 8 bits"),
        (IMAGES[:, :, :, 0], NAMES, "of shape \\(20, 24\\)"),
        (IMAGES[:, :3, :, :], NAMES, "channels first or last"),
        ([Image.fromarray(IMAGES[0]).convert("L")] * 6, NAMES, "of mode L"),
        (IMAGES, NAMES[:5], "6 images and 5 labels"),
        (IMAGES[:0], [], "0 images"),
        (IMAGES, ["Cat", *NAMES[1:]], "'Cat' are none of the classes"),
        (IMAGES, ["cat", 0, 0, 1, 2, 0], "neither whole numbers nor class names"),
        (IMAGES, [1.0, 0, 0, 1, 2, 0], "neither whole numbers nor class names"),
        (IMAGES, [True, False, False, True, True, False], "neither whole numbers"),
        ("folder", NAMES, "images are str"),
    ],
)
def test_what_does_not_fit_is_refused(images, labels, words):
    with pytest.raises(mb.InputError, match=words):
        mb.task_of("mine", images, labels, classes=CLASSES)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_without_a_class_is_refused(label):
    task = mb.task_of("mine", IMAGES, [*NUMBERS[:5], label], classes=CLASSES)
    with pytest.raises(mb.InputError, match=str(label)):
        load_task(task, n=None, seed=0)


def table(labels=NAMES, **columns):
    images = [Image.fromarray(image) for image in IMAGES]
    features = datasets.Features({"image": datasets.Image(), **columns.pop("features", {})})
    found = {"image": images, "label": labels, **columns}
    features["label"] = features.get("label", datasets.Value("string"))
    return datasets.Dataset.from_dict(found, features=features)


def test_names_are_labels_in_the_order_of_the_task_or_sorted(tmp_path):
    table().to_parquet(tmp_path / "t.parquet")
    for classes, expected in (((), ("bird", "cat", "dog")), (tuple(CLASSES), tuple(CLASSES))):
        data = f"parquet:{tmp_path / 't.parquet'}"
        task = mb.Task("t", data, ("{}",), classes=classes)
        assert load_task(task, n=None, seed=0).classes == expected
        assert loaded(task)[0] == NAMES
    more = mb.Task("t", data, ("{}",), classes=(*CLASSES, "fish"))
    assert load_task(more, n=None, seed=0).classes == (*CLASSES, "fish")
    with pytest.raises(mb.InputError, match="class"):
        load_task(mb.Task("t", data, ("{}",), classes=("Cat", "Dog", "hen")), n=None, seed=0)


@pytest.mark.parametrize("gap", [None, ""])
def test_a_missing_name_is_refused(tmp_path, gap):
    table([*NAMES[:5], gap]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(mb.InputError, match=r"00000005.*expected whole numbers from 0, or names"):
        load_task(mb.Task("t", f"parquet:{tmp_path / 't.parquet'}", ("{}",)), n=None, seed=0)


def test_a_data_set_saved_to_disk(tmp_path):
    table().save_to_disk(tmp_path / "one")
    task = mb.Task("t", f"saved:{tmp_path / 'one'}", ("a photo of a {}.",))
    names, pixels = loaded(task)
    assert names == NAMES
    assert np.array_equal(np.stack(pixels), IMAGES)
    record = mb.evaluate("tiny-clip", task=task, threat="pgd-1", eps="1/255", n=4)
    assert record.status == "ok"
    splits = datasets.DatasetDict(test=table(), train=table(NAMES[::-1]))
    splits.save_to_disk(tmp_path / "two")
    with pytest.raises(mb.InputError, match="has the splits test, train"):
        load_task(mb.Task("t", f"saved:{tmp_path / 'two'}", ("{}",)), n=None, seed=0)
    chosen = mb.Task("t", f"saved:{tmp_path / 'two'}", ("{}",), split="train")
    assert loaded(chosen)[0] == NAMES[::-1]
    revisions = {load_task(t, n=None, seed=0).revision for t in (task, chosen)}
    assert len(revisions) == 2


def test_what_is_no_saved_data_set_is_refused(tmp_path):
    with pytest.raises(mb.InputError, match="save_to_disk"):
        load_task(mb.Task("t", f"saved:{tmp_path / 'none'}", ("{}",)), n=None, seed=0)
    table().save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "data-00000-of-00001.arrow").rename(tmp_path / "elsewhere.arrow")
    state = tmp_path / "one" / "state.json"
    state.write_text(state.read_text().replace("data-00000-of-00001", "../elsewhere"))
    with pytest.raises(mb.InputError, match="outside of"):
        load_task(mb.Task("t", f"saved:{tmp_path / 'one'}", ("{}",)), n=None, seed=0)


def test_all_samples_and_suites_of_other_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "their_suites"
    folder.mkdir()
    (folder / "__init__.py").touch()
    table().save_to_disk(tmp_path / "one")
    text = f"""
name = "theirs-v1"
description = "of another package"
n = "all"
seed = 0
[[tasks]]
name = "t"
data = "saved:{tmp_path / "one"}"
[[threats]]
attack = "pgd-1"
norm = "linf"
eps = "1/255"
"""
    (folder / "theirs-v1.toml").write_text(text)
    (folder / "quick-v1.toml").write_text(text.replace("theirs", "quick"))

    class Entry:
        name, value = "theirs", "their_suites"

    shipped = suites.load_suite("quick-v1").digest
    monkeypatch.setattr(suites, "entry_points", lambda group: [Entry])
    assert "theirs-v1" in mb.list_suites()
    assert suites.load_suite("quick-v1").digest == shipped
    (record,) = mb.run("theirs-v1", "tiny-clip", out=tmp_path / "runs")
    assert record.results.n == 6
    assert record.suite.name == "theirs-v1"
    assert main(["list", "suites"]) == 0
    assert "of another package" in capsys.readouterr().out
    with pytest.raises(mb.InputError, match="does not ship"):
        suite_of(record)
    Entry.value = "no_such_package"
    with pytest.warns(UserWarning, match="no_such_package"):
        assert "theirs-v1" not in mb.list_suites()


def test_a_record_saves_itself(tmp_path):
    record = mb.evaluate("tiny-clip", task="digits/digit", threat="pgd-1", eps="1/255", n=4)
    record.save(tmp_path / "r.json")
    assert mb.read_record(tmp_path / "r.json") == record
    with pytest.raises(mb.InputError, match="written"):
        record.save(tmp_path / "r.json" / "r.json")
