"""One failure costs nobody else their turn: what is registered, plug-ins, files, logging."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

import mmtard_bench as mb
from mmtard_bench import hub, registry
from mmtard_bench.attacks.base import Attack, AttackResult
from mmtard_bench.hub import quiet, told
from mmtard_bench.records.files import load_records, made_at, oldest_first
from mmtard_bench.tasks.samples import load_task
from tests.conftest import ToyClip, wrap
from tests.test_arguments import scored


def test_what_others_register_may_fail_with_their_name(own):
    @mb.register_model("raises")
    def model():
        raise RuntimeError("weights not there")

    @mb.register_model("exits")
    def leaves():
        sys.exit(3)

    @mb.register_model("needs-more")
    def needs(argument):
        return argument

    @mb.register_dataset("lost")
    def lost():
        return {}["images"]

    @mb.register_attack("sick-{steps}")
    def sick(threat, n):
        raise ZeroDivisionError

    @mb.register_attack("none")
    def none(threat, n): ...

    for name, words in (
        ("raises", "weights not there"),
        ("exits", "3"),
        ("needs-more", "argument"),
    ):
        with pytest.raises(mb.InputError, match=f"model '{name}' is registered.*{words}"):
            mb.load_model(name)
    with pytest.raises(mb.InputError, match=r"data set 'lost'.*KeyError"):
        scored(task=mb.Task("t", "lost", ("{}",)))
    mb.register_dataset("listed")(list)
    with pytest.raises(mb.InputError, match="returned a list without class_names, ids, image"):
        scored(task=mb.Task("t", "listed", ("{}",)))
    with pytest.raises(mb.InputError, match=r"attack 'sick-{steps}'.*ZeroDivisionError"):
        scored(threat="sick-3")
    with pytest.raises(mb.InputError, match="returned a NoneType; expected an Attack"):
        scored(threat="none")
    assert scored().status == "ok"


def test_a_model_that_raises_leaves_the_others_their_turn(own, here):
    @mb.register_model("raises")
    def model():
        raise RuntimeError("weights not there")

    done = here("run", "quick-v1", "--n", "2", "--model", "raises", "--model", "tiny-clip")
    assert done.returncode == 2
    assert "weights not there" in done.stderr
    assert "tiny-clip digits/digit" in done.stdout


class Entry:
    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"{name}_package", load


def test_a_package_that_cannot_be_imported_costs_only_its_own_names(own, monkeypatch):
    def fails():
        raise ImportError("no module named theirs")

    def leaves():
        sys.exit("needs a licence")

    def takes():
        mb.register_model("tiny-clip")(lambda: None)

    def works():
        mb.register_model("theirs")(lambda: wrap(ToyClip(), "theirs"))

    entries = [Entry(f.__name__, f) for f in (fails, leaves, takes, works)]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry._load_other_packages.cache_clear()
    try:
        with pytest.warns(UserWarning, match="could not be imported") as said:
            assert mb.load_model("theirs").name == "theirs"
        assert [
            name in str(w.message)
            for name, w in zip(("fails", "leaves", "takes"), said, strict=True)
        ]
        assert "no module named theirs" in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            assert mb.load_model("tiny-clip").name == "tiny-clip"
    finally:
        registry._load_other_packages.cache_clear()


EARLY = """
import mmtard_bench as mb
mb.register_model("tiny-clip")(lambda: None)
try:
    mb.load_model("tiny-clip")
except mb.InputError as error:
    print(error)
print(mb.load_model("tiny-clip-small").name)
"""


def test_a_name_of_ours_that_somebody_took_first_costs_only_itself():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, name = done.stdout.splitlines()
    assert "'tiny-clip' is one of this package's, and another was registered" in said
    assert name == "tiny-clip-small"


@pytest.mark.parametrize(
    "name",
    [
        "mine-{restarts}",
        "mine-{steps",
        "mine-{}",
        "mine-{steps}-{steps}",
        "mine {steps}",
        "mine/pgd",
        "-mine",
        "",
        " ",
        None,
        3,
    ],
)
def test_names_of_attacks_are_refused_where_they_are_registered(own, name):
    before = list(registry.attacks)
    with pytest.raises(mb.InputError, match="name"):
        mb.register_attack(name)(lambda threat, n: None)
    with pytest.raises(mb.InputError, match="name"):
        registry.attacks.add(name, lambda threat, n: None)
    assert list(registry.attacks) == before


def test_an_attack_of_ones_own_runs(own):
    @mb.register_attack("still-{steps}-k{edits}")
    def build(threat, n_classes):
        def run(work):
            count = len(work.ids)
            return AttackResult(work.images, [None] * count, [1] * count, [0] * count)

        return Attack(threat.attack, {"classes": n_classes}, run)

    record = scored(threat="still-3-k1")
    assert record.status == "ok", record.error
    assert record.robust_accuracy == record.clean_accuracy
    with pytest.raises(mb.InputError, match="Attack: parameters"):
        Attack("mine", {"norm": ["linf"]}, lambda work: None)


@pytest.mark.parametrize("register", [mb.register_model, mb.register_dataset, mb.register_attack])
def test_only_functions_are_registered(own, register):
    with pytest.raises(mb.InputError, match="expected a function"):
        register("mine")("no function")
    with pytest.raises(mb.InputError, match="string"):
        register(lambda: None)  # the name was forgotten


def test_only_tasks_are_registered(own):
    with pytest.raises(mb.InputError, match="expected a Task"):
        mb.register_task("digits/digit")


def test_other_files_below_a_run_are_passed_over_and_damaged_records_are_not(tmp_path, here):
    record = scored()
    record.save(tmp_path / "runs" / "a.json")
    others = {
        "runs/ard/card.json": "{}",
        "runs/study/checkpoints/x/card.json": '{"recipe_name": "ard", "seconds": 3.0}',
        "runs/figures/data.json": "[1, 2]",
        "runs/notes.json": '"text"',
        "runs/folder.json/origin.json": '{"seed": 0}',
    }
    for name, text in others.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_records(tmp_path / "runs") == [record]
    for command in (["show", "runs"], ["leaderboard", "--records", "runs", "--output", "b.md"]):
        done = here(*command)
        assert done.returncode == 0, done.stderr
    text = (tmp_path / "runs" / "a.json").read_text()
    damaged = (text[:-40], "", "{", text.replace('"robust": false', '"robust": true', 1), "\0")
    for content in (*damaged, '{"identity": 1}'):
        (tmp_path / "runs" / "b.json").write_text(content)
        with pytest.raises(mb.InputError, match="edited or cut short"):
            load_records(tmp_path / "runs")
    (tmp_path / "runs" / "b.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(mb.InputError, match="cannot be read"):
        load_records(tmp_path / "runs")


def test_of_two_records_the_later_in_time_counts():
    record = scored()
    assert made_at(record).tzinfo is not None
    again = scored()
    assert oldest_first([again, record]) == oldest_first([record, again]) == [record, again]
    times = (
        "2026-11-24T23:00:00-05:00",
        "2026-11-24T09:00:00+05:00",
        "2026-11-24T05:00:00.000001+00:00",
        "2026-11-24T05:00:00",
    )
    made = [record.model_copy(update={"created": text}) for text in times]
    assert [times.index(r.created) for r in oldest_first(made)] == [1, 3, 2, 0]
    with pytest.raises(mb.InputError, match="expected a time"):
        oldest_first([record.model_copy(update={"created": "yesterday"})])


def test_the_applications_logging_stays_as_it_was(tmp_path):
    manager, datasets_log = logging.root.manager, logging.getLogger("datasets")
    level = datasets_log.level
    try:
        logging.disable(logging.ERROR)
        datasets_log.setLevel(logging.DEBUG)
        with quiet(), quiet():
            assert manager.disable >= logging.ERROR
        assert manager.disable == logging.ERROR
        with pytest.raises(mb.InputError):
            scored(task=f"imagefolder:{tmp_path}")
        assert datasets_log.level == logging.DEBUG
        assert manager.disable == logging.ERROR
        # What a person is told of downloads does not go through it.
        said = []
        with told(said.append):
            hub._tell("a line")
        assert said == ["a line"]
    finally:
        logging.disable(logging.NOTSET)
        datasets_log.setLevel(level)


class Pair:
    """Two images, as somebody might register them."""

    revision, class_names, labels = "1", ("a", "b"), (0, 1)
    ids: Sequence[object] = ("x", "y")

    def image(self, index):
        return np.full((4, 4, 3), index, np.uint8)


def pair(**changes):
    name = f"pair-{len(list(registry.datasets))}"
    mb.register_dataset(name)(type("Changed", (Pair,), changes))
    data = load_task(mb.Task("t", name, ("{}",)), n=None, seed=0)
    return sorted((label, int(data.pixels(row)[0, 0, 0])) for row, label in enumerate(data.labels))


@pytest.mark.parametrize(
    "image",
    [
        np.full((4, 4, 3), 0.5),
        np.full((4, 4, 3), 300, np.uint16),
        np.full((3, 4, 4), 1, np.uint8),
        np.full((4, 4), 1, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (4, 4)),
        torch.zeros(3, 4, 4),
    ],
    ids=["floats", "16 bits", "channels first", "grey", "empty", "Pillow", "torch"],
)
def test_images_of_registered_data_are_pixels_of_8_bits(own, image):
    """Floats from 0 to 1 would be divided by 255: black squares."""
    with pytest.raises(mb.InputError, match=r"image of sample '[xy]' is .*uint8, \(H, W, 3\)"):
        pair(image=lambda self, index: image)


def test_labels_and_ids_of_registered_data(own):
    for labels in ([0, 1], np.array([0, 1]), torch.tensor([0, 1])):
        assert pair(labels=labels) == [(0, 0), (1, 1)]
    backwards = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)[..., ::-1]
    assert pair(image=lambda self, index: backwards[index]) == [(0, 2), (1, 50)]
    for changes, words in (
        ({"labels": [0.0, 1.0]}, "the labels are like 0.0|the labels are like 1.0"),
        ({"labels": [0]}, "1 labels for 2 samples"),
        ({"ids": [0, 1]}, "sample ids like 0"),
    ):
        with pytest.raises(mb.InputError, match=words):
            pair(**changes)
