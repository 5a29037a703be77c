"""Forged files of adversarial images: outside the ball or box, of other samples, or no images."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.leaderboard.verify.images import (
    LARGEST,
    Stack,
    read_adversarials,
    write_adversarials,
)
from tests.conftest import assert_sentence
from tests.leaderboard.verify import forge

FILE = Path("a.safetensors")


@pytest.fixture
def stored(here, copy):
    """An honest entry with its file of images."""
    folder = copy("weak")
    options = ("--name", "weak", "--entries", folder.parent, "--adversarials", FILE)
    done = here("submit", folder, *options)
    assert done.returncode == 0, done.stderr
    return folder


def rewrite(folder, change):
    """Other stacks in the file, and its new hash in the card."""
    file = read_adversarials(FILE)
    tensors = load_file(FILE)
    stacks = [(stack, tensors[str(i)]) for i, stack in enumerate(file.contents.stacks)]
    new = write_adversarials(FILE, file.contents.model, change(stacks))
    forge.recard(folder, adversarials=new.digest)


def verify(here, folder):
    return here("verify", folder, "--adversarials", FILE)


def test_an_image_outside_of_the_ball(here, stored):
    def outside(stacks):
        stack, pixels = stacks[0]
        pixels = pixels.copy()
        one = pixels[0, 0, 0, 0]
        pixels[0, 0, 0, 0] = one + 20 if one < 128 else one - 20
        return [(stack, pixels), *stacks[1:]]

    rewrite(stored, outside)
    assert_sentence(verify(here, stored), "is outside the ball")


def test_a_ball_that_the_suite_does_not_have(here, stored):
    rewrite(
        stored, lambda stacks: [(s.model_copy(update={"eps": "255/255"}), p) for s, p in stacks]
    )
    assert_sentence(verify(here, stored), "small-v1 has no such task and ball")


@pytest.mark.parametrize("kind", ["float32", "int16", "uint32"])
def test_pixels_that_could_leave_the_box(stored, kind):
    """Integers of 8 or 16 bits cannot; no other type is read."""
    file = read_adversarials(FILE)
    metadata = {"mmtard_bench": file.contents.model_dump_json()}
    tensors = {name: values.astype(kind) * 2 for name, values in load_file(FILE).items()}
    save_file(tensors, FILE, metadata)
    with pytest.raises(InputError, match="expected U8 or U16"):
        read_adversarials(FILE)


def test_clean_images_that_break_nothing(here, stored):
    from mmtard_bench.tasks.samples import load_task
    from mmtard_bench.tasks.suites import load_suite

    suite = load_suite("small-v1")
    data = load_task(suite.plan[0][0], n=suite.n, seed=suite.seed)

    def clean(stacks):
        ids = list(data.manifest.ids)
        return [(s, np.stack([data.pixels(ids.index(name)) for name in s.ids])) for s, _ in stacks]

    rewrite(stored, clean)
    assert_sentence(verify(here, stored), "images do not break their sample")


def test_images_of_other_samples(here, stored):
    def renamed(stacks):
        stack, pixels = stacks[0]
        ids = ["digits/test/none", *stack.ids[1:]]
        return [(stack.model_copy(update={"ids": ids}), pixels), *stacks[1:]]

    rewrite(stored, renamed)
    assert_sentence(verify(here, stored), "'digits/test/none' is no sample")


def test_swapped_samples(here, stored):
    def swapped(stacks):
        stack, pixels = stacks[0]
        ids = [stack.ids[1], stack.ids[0], *stack.ids[2:]]
        return [(stack.model_copy(update={"ids": ids}), pixels), *stacks[1:]]

    rewrite(stored, swapped)
    assert_sentence(verify(here, stored), "is outside the ball")


def test_images_of_another_size(here, stored):
    rewrite(stored, lambda stacks: [(s, p[:, ::2, ::2]) for s, p in stacks])
    assert_sentence(verify(here, stored), "its images are (16, 16); those of the task are (32, 32)")


def test_a_file_that_was_changed_after_the_card(here, stored):
    data = bytearray(FILE.read_bytes())
    data[-1] ^= 1
    FILE.write_bytes(data)
    assert_sentence(verify(here, stored), "is not the file of the entry")


def header(**changes):
    stack = {"task": "t", "norm": "linf", "eps": "8/255", "surface": "native"}
    stack |= {"suite": "small-v1", "attack": "pgd-5", "ids": ["a"], **changes}
    return json.dumps({"version": 1, "model": "d", "stacks": [stack]})


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"mmtard_bench": "{"},
        {"mmtard_bench": "[" * 100_000},
        {"mmtard_bench": header(task="<b>t</b>")},
        {"mmtard_bench": header(attack="a|b")},
        {"mmtard_bench": header(suite="../x-v1")},
        {"mmtard_bench": header(eps="0.03")},
        {"mmtard_bench": header(eps="1/0")},
        {"mmtard_bench": header(norm="levenshtein")},
        {"mmtard_bench": header(ids=["a", "a"])},
        {"mmtard_bench": header(ids=[])},
        {"mmtard_bench": header(ids=["a", "b"])},
        {"mmtard_bench": header(extra=1)},
    ],
)
def test_headers_that_are_none(tmp_path, metadata):
    path = tmp_path / "x"
    save_file({"0": np.zeros((1, 2, 2, 3), np.uint8)}, path, metadata)
    with pytest.raises(InputError, match="not a file of adversarial images"):
        read_adversarials(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\xff" * 100, b"<html></html>"])
def test_files_that_are_none(here, stored, content):
    FILE.write_bytes(content)
    assert_sentence(verify(here, stored), "is not a file of adversarial images")


def test_tensors_and_stacks_that_do_not_go_together(tmp_path):
    path = tmp_path / "x"
    images = np.zeros((1, 2, 2, 3), np.uint8)
    save_file({"0": images, "1": images}, path, {"mmtard_bench": header()})
    with pytest.raises(InputError, match="but its tensors are others"):
        read_adversarials(path)


def test_a_huge_file_is_refused_fast(tmp_path):
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, LARGEST + 1)
    started = time.monotonic()
    with pytest.raises(InputError, match="4,294,967,297 bytes"):
        read_adversarials(path)
    assert time.monotonic() - started < 1


def test_a_break_counts_only_images_in_the_ball(here, stored):
    """Of a file with an image that left the ball and one that did not."""
    forge.rewrite(stored, forge.samples(lambda some: forge.overstated(some, 2)))
    robust = sorted(s.id for s in read_entry(stored).records[0].samples if s.robust)

    def outside(stacks):
        (stack, pixels), *others = stacks
        pixels = pixels.copy()
        row = stack.ids.index(robust[0])
        pixels[row] = 255 - pixels[row]
        return [(stack, pixels), *others]

    rewrite(stored, outside)
    done = here("break", stored, "--adversarials", FILE, "--by", "me")
    assert done.returncode == 0, done.stderr
    assert "1 are outside the ball or box" in done.stdout
    (path,) = (stored.parent.parent / "breaks").iterdir()
    assert json.loads(path.read_text())["fallen"][0]["ids"] == robust[1:]


def test_the_stack_says_what_it_is():
    stack = Stack.model_validate_json(json.dumps(json.loads(header())["stacks"][0]))
    assert stack.name == "t linf 8/255 native"
