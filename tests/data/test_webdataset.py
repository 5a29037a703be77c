"""Shards in CLIP_benchmark's layout: read by offset, only those that are needed, never trusted."""

import io
import os
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest

import mmtard_bench as mb
from mmtard_bench.data.decode import decode
from mmtard_bench.tasks.samples import find_task, load_manifest, load_task
from mmtard_bench.types import Task
from tests.cli.test_bad_input import rgb
from tests.conftest import assert_sentence
from tests.hub import COMMIT, Fault, hub
from tests.shards import NAMES, cifar10, layout, noise, tar, write


def test_a_folder_is_read_as_it_is(tmp_path):
    images, labels = noise(7)
    task = find_task(write(layout(images, labels, shards=2), tmp_path))
    data = load_task(task, n=None, seed=0)
    assert data.classes == tuple(NAMES)
    assert data.templates == ("a photo of a {}.", "a drawing of a {}.")
    assert sorted(data.manifest.ids) == [f"s{i:07d}" for i in range(7)]
    for row, i in enumerate(data.manifest.indices):
        assert data.manifest.ids[row] == f"s{i:07d}"
        assert data.labels[row] == labels[i]
        assert np.array_equal(data.pixels(row), decode(images[i], "x", convert_rgb=False))


def test_real_images_survive_the_shards_exactly(tmp_path):
    images, labels, names = cifar10(20)
    files = layout(images, labels, shards=3, names=names, kind="png")
    data = load_task(find_task(write(files, tmp_path)), n=None, seed=0)
    for row, i in enumerate(data.manifest.indices):
        assert np.array_equal(data.pixels(row), decode(images[i], "x", convert_rgb=False))


def test_the_shard_count_changes_neither_manifest_nor_revision(tmp_path):
    images, labels = noise(23)
    drawn = set()
    for shards in (1, 5):
        spec = write(layout(images, labels, shards=shards), tmp_path / str(shards))
        data = load_task(find_task(spec), n=11, seed=3)
        drawn.add((data.revision, data.manifest, data.labels))
    assert len(drawn) == 1
    write(layout([*images[:-1], rgb(99)], labels, shards=1), tmp_path / "1")
    changed = load_task(find_task(f"wds:{tmp_path / '1'}"), n=11, seed=3)
    assert changed.revision != data.revision


@pytest.mark.parametrize("hint", [None, 5, 3, 20])
def test_only_the_shards_that_the_manifest_needs_are_downloaded(online, hint):
    images, labels = noise(25)
    task = replace(find_task("wds:me/pets"), samples=25, shard_samples=hint)
    asked: list[str] = []
    repositories = {"datasets:me/pets": layout(images, labels, shards=5)}
    with hub(repositories, asked=asked) as endpoint:
        online(endpoint)
        data = load_task(task, n=1, seed=0)
        fetched = {line.rpartition("/")[2] for line in asked if line.endswith(".tar")}
        assert data.labels == (labels[data.manifest.indices[0]],)
        assert np.array_equal(
            data.pixels(0), decode(images[data.manifest.indices[0]], "x", convert_rgb=False)
        )
        needed = f"{data.manifest.indices[0] // 5}.tar"
        # With the right hint no other; without, the first as well; a wrong one costs a few more.
        expected = {5: {needed}, None: {"0.tar", needed}}
        assert fetched == expected.get(hint, fetched)
        assert needed in fetched
        everything = load_task(find_task("wds:me/pets"), n=None, seed=0)
    assert data.revision == everything.revision == f"me/pets@{COMMIT}"
    assert everything.manifest.ids[0] == data.manifest.ids[0]
    assert {line for line in asked if line.endswith(".tar")} == {
        f"{method} /datasets/me/pets/resolve/{COMMIT}/test/{i}.tar"
        for i in range(5)
        for method in ("HEAD", "GET")
    }


@pytest.mark.parametrize("samples", [24, 26, 50])
def test_a_wrong_number_of_samples_is_a_sentence(online, samples):
    images, labels = noise(25)
    task = replace(find_task("wds:me/pets"), samples=samples)
    with hub({"datasets:me/pets": layout(images, labels, shards=5)}) as endpoint:
        online(endpoint)
        with pytest.raises(mb.InputError, match=r"samples = .*correct"):
            load_task(task, n=None, seed=0)


def test_a_manifest_needs_no_shard_where_the_task_states_the_samples(online):
    images, labels = noise(10)
    asked: list[str] = []
    with hub({"datasets:me/pets": layout(images, labels, shards=2)}, asked=asked) as endpoint:
        online(endpoint)
        task = find_task("wds:me/pets")
        manifest = load_manifest(replace(task, samples=10), n=4, seed=1)
        assert not any(line.endswith(".tar") for line in asked)
        assert load_task(task, n=4, seed=1).manifest == manifest


def damaged(tmp_path, files, **changes):
    task = replace(find_task(write(files, tmp_path / "d")), **changes)
    with pytest.raises(mb.InputError) as caught:
        load_task(task, n=None, seed=0).require_images("native")
    return str(caught.value)


def test_shards_that_are_no_shards(tmp_path):
    images, labels = noise(4)
    good = layout(images, labels)
    shard = good["test/0.tar"]

    def said(data: bytes) -> str:
        return damaged(tmp_path, {**good, "test/0.tar": data})

    for cut in (0, 700, len(shard) // 2, 1024 * 2):
        assert "test/0.tar" in said(shard[:cut])
    assert "no tar archive" in said(b"<!doctype html><title>Log in</title>")
    # Cut exactly between two samples: tarfile takes it for whole.
    two = tar({"s0000000.cls": b"1", "s0000000.webp": images[0]})
    whole = two.rstrip(b"\0")
    assert "cut short" in said(two[: -(-len(whole) // 512) * 512])
    # Two shards joined by cat: tarfile reads the first.
    assert "archives joined by cat" in said(two + tar({"b.cls": b"1", "b.webp": images[1]}))
    assert "only .cls or only the image" in said(tar({"s0000000.cls": b"1"}))
    assert "not a whole number" in said(tar({"a.cls": b"\x80\x04N.", "a.webp": images[0]}))
    assert "damaged or no image" in said(tar({"a.cls": b"1", "a.webp": images[0][:100]}))


@pytest.mark.parametrize(
    "keys",
    [
        ["golden retriever 7", "my cat"],
        ["café", "猫"],
        ["img(1)", "a+b", "x,y"],
        ["22.05", "img.v2"],
        ["n01/a", "n02/a", "./b"],
        ["k" * 250],
    ],
)
def test_every_key_is_a_sample(tmp_path, keys):
    images, _ = noise(len(keys))
    members: dict[str, bytes] = {}
    for number, (key, image) in enumerate(zip(keys, images, strict=True)):
        members |= {f"{key}.cls": str(number).encode(), f"{key}.WebP": image, f"{key}.json": b"{}"}
    files = {**layout(*noise(1)), "test/0.tar": tar(members)}
    data = load_task(find_task(write(files, tmp_path)), n=None, seed=0)
    assert dict(zip(data.manifest.ids, data.labels, strict=True)) == {
        key: number for number, key in enumerate(keys)
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"b.cls": b"1", "b.avif": b"x"}, "'b' there is only .cls or only the image"),
        ({"b.avif": b"x"}, "it holds 'b.avif', which is not part of a sample"),
        ({"b": b"x"}, "it holds 'b', which is not part"),
        ({"b/.webp": b"x"}, "it holds 'b/.webp', which is not part"),
        ({"b\n.webp": b"x"}, "which is not part of a sample"),
        ({"b.json": b"{}"}, "'b' there is only .cls or only the image"),
        ({"b.webp": b"x"}, "'b' there is only .cls or only the image"),
        ({"a.png": b"x"}, "it holds the sample 'a' twice"),
        ({"a.CLS": b"1"}, "it holds the sample 'a' twice"),
        ({"b.webp": b"x", "b.cls": b" " * 70_000}, "the text of 'b' is longer|not a whole number"),
    ],
)
def test_members_that_are_not_used_are_named(tmp_path, more, words):
    image = noise(1)[0][0]
    shard = tar({"a.cls": b"1", "a.webp": image, **more})
    said = damaged(tmp_path, {**layout(*noise(1)), "test/0.tar": shard})
    assert re.search(words, said), said


def test_links_in_a_shard_are_named(tmp_path):
    """tar stores files that are hard links of each other once."""
    image = noise(1)[0][0]
    buffer = io.BytesIO(tar({"a.cls": b"1", "a.webp": image}))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        for name in ("b.cls", "b.webp"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, f"a{name[1:]}"
            archive.addfile(info)
    said = damaged(tmp_path, {**layout(*noise(1)), "test/0.tar": buffer.getvalue()})
    assert "it holds 'b.cls', which is not part of a sample" in said


def test_class_names_are_lines_whatever_wrote_them(tmp_path):
    names = ["cat", "d\x85og", "hen\u2028", "cow", "eel"]
    text = "\ufeff" + "".join(f"{name}\r\n" for name in names)
    files = {**layout(*noise(5)), "classnames.txt": text.encode()}
    assert load_task(find_task(write(files, tmp_path)), n=None, seed=0).classes == tuple(names)


@pytest.mark.parametrize("name", ["classnames.txt", "test/nshards.txt", "test/0.tar"])
def test_a_pipe_is_not_read(tmp_path, name):
    task = find_task(write(layout(*noise(3)), tmp_path))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(mb.InputError, match=f"{name} is not a regular file"):
        load_task(task, n=None, seed=0)


def test_shards_that_are_not_counted_are_named(tmp_path):
    files = layout(*noise(9), shards=3)
    assert "the shards 2.tar are there too" in damaged(
        tmp_path, {**files, "test/nshards.txt": b"2"}
    )


def test_samples_that_the_task_states_have_no_gap(tmp_path):
    images, labels = noise(9)
    files = layout(images, labels)
    for samples, renamed in ((9, "s0000042"), (9, "extra"), (8, "s0000003")):
        shard = {}
        for number, image in enumerate(images):
            key = renamed if number == 3 else f"s{number:07d}"
            shard |= {f"{key}.cls": b"1", f"{key}.webp": image}
        said = damaged(tmp_path, {**files, "test/0.tar": tar(shard)}, samples=samples)
        assert f"do not follow from samples = {samples} in the task" in said


def test_labels_of_a_shard_are_checked_even_of_samples_that_are_not_drawn(tmp_path):
    images, labels = noise(5)
    files = layout(images, [label + 1 for label in labels])
    for seed in range(3):
        with pytest.raises(mb.InputError, match=r"label 5, but .* They seem to count from 1"):
            load_task(find_task(write(files, tmp_path)), n=1, seed=seed)


def test_member_names_are_not_trusted(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("../../out.webp", tarfile.REGTYPE), ("l.webp", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    images, labels = noise(1)
    files = {**layout(images, labels), "test/0.tar": buffer.getvalue()}
    assert "only .cls or only the image" in damaged(tmp_path, files)
    assert {path.name for path in tmp_path.rglob("*.webp")} == set()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classnames.txt": b"cat\ndog\nhen\ncow\n"}, "the label 4, but there are 4 classes"),
        ({"classnames.txt": b"cat\n\nhen\ncow\neel\n"}, "line 2 of classnames.txt is empty"),
        ({"zeroshot_classification_templates.txt": b"a photo\n"}, "exactly one {c}"),
        ({"zeroshot_classification_templates.txt": b""}, "brings no prompt templates"),
        ({"test/nshards.txt": b"<html>"}, "expected a number"),
        ({"test/nshards.txt": b"7"}, "test/1.tar"),
    ],
)
def test_files_of_the_layout_that_are_wrong(tmp_path, change, words):
    images, labels = noise(5)
    assert words in damaged(tmp_path, {**layout(images, labels), **change})


def test_prompts_for_another_number_of_classes_are_a_sentence(tmp_path):
    images, labels = noise(5)
    files = layout(images, labels)
    six = (*NAMES, "fox")
    said = damaged(tmp_path, files, classes=six)
    assert "6 classes" in said
    assert "the data set names 5" in said
    assert "the task states 7" in damaged(tmp_path, files, n_classes=7)
    five = ("kitten", *NAMES[1:])
    both = replace(find_task(f"wds:{tmp_path / 'd'}"), classes=five, n_classes=5)
    assert load_task(both, n=None, seed=0).classes == five


def test_a_manifest_on_the_command_line(here, tmp_path):
    images, labels = noise(9)
    printed = set()
    for shards in (1, 5):
        spec = write(layout(images, labels, shards=shards), tmp_path / str(shards))
        done = here("manifest", spec, "--n", "4", "--seed", "2")
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1
    ids = printed.pop().split()
    assert len(ids) == 4
    assert set(ids) <= {f"s{i:07d}" for i in range(9)}
    longer = here("manifest", spec, "--seed", "2", "--json").stdout
    assert [line.strip(' ",') for line in longer.splitlines()[1:5]] == ids
    assert_sentence(here("manifest", spec, "--n", "10"), "n = 10", "holds 9")
    assert_sentence(here("manifest", "cifra10"), "no task 'cifra10'", "cifar10")
    assert_sentence(here("manifest", "wds:nowhere"), "no such folder")
    assert len(here("manifest", "digits/digit", "--n", "3").stdout.split()) == 3


def test_a_manifest_of_a_declared_task_needs_the_network_once(here, online):
    asked: list[str] = []
    with hub({}, faults=[Fault(404, every=True)], asked=asked) as endpoint:
        online(endpoint)
        # Its commit is declared, and its number of samples: nothing is asked.
        done = here("manifest", "pcam", "--n", "1000")
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1000
    assert asked == []


def test_captions_of_a_retrieval_shard(tmp_path):
    """KEY.txt has a caption a line; captions of one text are one item of the gallery."""
    images, _ = noise(3)
    texts = ["a cat\n\na grey cat\n", "a dog", " a cat "]
    members: dict[str, bytes] = {}
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        members |= {f"s{i:07d}.txt": text.encode(), f"s{i:07d}.webp": image}
    spec = write({"test/nshards.txt": b"1", "test/0.tar": tar(members)}, tmp_path)
    task = Task(name="pets", data=spec, templates=("{}",), metric="retrieval", label_column="txt")
    data = load_task(task, n=None, seed=0)
    by_id = dict(zip(data.manifest.ids, data.matches, strict=True))
    captions = {key: {data.classes[place] for place in own} for key, own in by_id.items()}
    assert captions == {
        "s0000000": {"a cat", "a grey cat"},
        "s0000001": {"a dog"},
        "s0000002": {"a cat"},
    }
    members["s0000001.txt"] = b" \n"
    write({"test/0.tar": tar(members)}, tmp_path)
    with pytest.raises(mb.InputError, match="'s0000001' has no caption"):
        load_task(task, n=None, seed=0)
    del members["s0000001.txt"]
    write({"test/0.tar": tar(members)}, tmp_path)
    with pytest.raises(mb.InputError, match=r"'s0000001' there is only \.txt or only the image"):
        load_task(task, n=None, seed=0)
