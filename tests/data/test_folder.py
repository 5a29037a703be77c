"""Folders of images: every file is a sample, of a kind that is ignored, or named in an error."""

import os
from pathlib import Path

import pytest

import mmtard_bench as mb
from mmtard_bench.tasks.samples import TaskData, load_task
from tests.cli.test_bad_input import rgb


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rgb(number, (4, 4)))


def load(folder: Path, **fields: object) -> TaskData:
    facts = {"templates": ("a photo of a {}.",), **fields}
    return load_task(mb.Task("t", f"imagefolder:{folder}", **facts), n=None, seed=0)


def named(data: TaskData) -> dict[str, str]:
    """The class of each sample, by name."""
    pairs = zip(data.manifest.ids, data.labels, strict=True)
    return {sample: data.classes[label] for sample, label in pairs}


def by_folder(*names: str) -> dict[str, str]:
    return {name: name.rsplit("/", 2)[-2] for name in names}


@pytest.mark.parametrize(
    "names",
    [
        ("kitchen/1.png", "train_station/1.png", "train_interior/2.png", "val/3.png"),
        ("bus/1.png", "car/1.png", "train/1.png"),
        ("cat/test_1.png", "cat/2.png", "dog/test-3.png", "dog/train.png"),
        ("Cat/a.JPEG", "Cat/b.PNG", "dog/c.Jpg", "dog/d.tiff", "dog/e.webp"),
        ("images/cat/1.png", "images/dog/1.png"),
        ("test/cat/1.png", "test/dog/2.png"),
        ("Tür & Tor/ä 1.png", "[x]/2.png", "a,b/*.png", "s/10.15\u202fAM.png"),
    ],
)
def test_every_image_is_a_sample_of_its_own_folder(tmp_path, names):
    write(tmp_path, *names)
    assert named(load(tmp_path)) == by_folder(*names)


def test_folders_of_splits(tmp_path):
    tests = ("val/cat/1.png", "val/dog/2.png", "val/dog/train_3.png")
    write(tmp_path, "train/ant/1.png", "train/cat/1.png", "train/dog/1.png", *tests)
    # Both are names of it; the classes are those of all splits.
    for split in ("val", "validation"):
        data = load(tmp_path, split=split)
        assert named(data) == by_folder(*tests)
        assert data.classes == ("ant", "cat", "dog")
        assert data.notes == ("1 of 3 classes have no sample in the data (ant).",)
    with pytest.raises(mb.InputError, match="has the splits train, validation; choose one"):
        load(tmp_path)
    write(tmp_path, "valid/cat/1.png")
    with pytest.raises(mb.InputError, match="two folders for the split 'validation'"):
        load(tmp_path, split="val")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat/1.png", "dog/1.png", "2.png"), "not in one folder a class: '2.png'"),
        (("cat/tabby/1.png", "dog/2.png"), "not in one folder a class: 'dog/2.png'"),
        (("cat/a/1.png", "dog/a/2.png"), "not in one folder a class"),
        (("train/1.png", "test/2.png"), "all images lie in one folder"),
        (("cat/1.png", "cat/2.png"), "all images lie in one folder"),
        (("cat/1.png", "dog/1.avif"), "1 files are no images that can be read .dog/1.avif"),
        (("cat/1.png", "dog/1"), "1 files are no images that can be read .dog/1"),
        (("cat/1.png", "dog/1.eps", "dog/2.png"), "no images that can be read .dog/1.eps"),
        (("cat/1.png", "dog/1.zip", "dog/2.png"), "no images that can be read .dog/1.zip"),
    ],
)
def test_files_without_a_place_are_named(tmp_path, names, words):
    write(tmp_path, *names)
    with pytest.raises(mb.InputError, match=words):
        load(tmp_path, split="test" if "test/2.png" in names else None)


def test_what_is_no_sample_is_ignored(tmp_path):
    others = ("README", "x.tar", ".git/x.png", "__MACOSX/cat/1.png", "cat/._1.png", "cat/1.txt")
    write(tmp_path, "cat/1.png", "dog/1.png", *others, "cat/Thumbs.db", "marks/1.xml")
    assert named(load(tmp_path)) == by_folder("cat/1.png", "dog/1.png")


def test_a_broken_link_a_pipe_and_an_empty_class_are_named(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog" / "2.png").symlink_to("gone.png")
    with pytest.raises(mb.InputError, match=r"'dog/2\.png' is a broken link"):
        load(tmp_path)
    (tmp_path / "dog" / "2.png").unlink()
    (tmp_path / "dog" / "2.png").symlink_to("2.png")
    with pytest.raises(mb.InputError, match=r"cannot be read: .*levels of symbolic links"):
        load(tmp_path)
    (tmp_path / "dog" / "2.png").unlink()
    os.mkfifo(tmp_path / "dog" / "2.png")
    with pytest.raises(mb.InputError, match=r"'dog/2\.png' is .*not a regular file"):
        load(tmp_path)
    (tmp_path / "dog" / "2.png").unlink()
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / ".DS_Store").touch()
    with pytest.raises(mb.InputError, match="the folder 'eel' is empty"):
        load(tmp_path)


def test_linked_folders_are_read_and_count_in_the_revision(tmp_path):
    write(tmp_path, "there/dog/1.png", "here/cat/1.png")
    (tmp_path / "here" / "dog").symlink_to(tmp_path / "there" / "dog")
    data = load(tmp_path / "here")
    assert named(data) == by_folder("cat/1.png", "dog/1.png")
    (tmp_path / "there" / "dog" / "1.png").write_bytes(rgb(9))
    assert load(tmp_path / "here").revision != data.revision
    (tmp_path / "here" / "cat" / "again").symlink_to(tmp_path / "here")
    with pytest.raises(mb.InputError, match="leads back to a folder that holds it"):
        load(tmp_path / "here")


def test_the_revision_is_that_of_earlier_versions(tmp_path):
    """It is part of published identities: names and contents of all files, sorted by parts."""
    for name in ("a/1.png", "a-b/1.png", "a/x.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    expected = "sha256:73c179a2c7deed9a33df36060ec8af5dfb51f17d9063d5b118fc881cf8974081"
    assert load(tmp_path).revision == expected


CAPTIONS = {
    "metadata.jsonl": '{"file_name": "1.png", "text": "a cat"}\n'
    '{"file_name": "b/2.png", "text": "a dog, test"}\n',
    "metadata.csv": 'file_name,text\n1.png,a cat\nb/2.png,"a dog, test"\n',
}


@pytest.mark.parametrize("table", CAPTIONS)
def test_captions_from_a_table(tmp_path, table):
    write(tmp_path, "1.png", "b/2.png")
    (tmp_path / table).write_text(CAPTIONS[table])
    fields = {"metric": "retrieval", "label_column": "text", "templates": ("{}",)}
    data = load(tmp_path, **fields)
    captions = {s: data.classes[m[0]] for s, m in zip(data.manifest.ids, data.matches, strict=True)}
    assert captions == {"1.png": "a cat", "b/2.png": "a dog, test"}
    write(tmp_path, "3.png")
    with pytest.raises(mb.InputError, match=r"1 are images that no row names .3\.png"):
        load(tmp_path, **fields)
    (tmp_path / "3.png").unlink()
    (tmp_path / "1.png").unlink()
    with pytest.raises(mb.InputError, match=r"named, but not among the images .1\.png"):
        load(tmp_path, **fields)


def test_labels_from_a_table_in_each_split(tmp_path):
    for split, label in (("train", 1), ("test", 0)):
        write(tmp_path, f"{split}/1.png")
        row = f"file_name,label\n1.png,{label}\n"
        (tmp_path / split / "metadata.csv").write_text(row)
    data = load(tmp_path, split="test", classes=("cat", "dog"))
    assert named(data) == {"test/1.png": "cat"}
    (tmp_path / "test" / "metadata.csv").rename(tmp_path / "metadata.csv")
    with pytest.raises(mb.InputError, match="one table in each folder of a split"):
        load(tmp_path, split="test", classes=("cat", "dog"))


@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "b/../../secret.png"])
def test_a_table_names_no_file_outside_of_the_folder(tmp_path, name):
    write(tmp_path, "secret.png", "in/1.png")
    name = name.replace("/secret", f"{tmp_path}/secret") if name[0] == "/" else name
    (tmp_path / "in" / "metadata.csv").write_text(f"file_name,label\n1.png,0\n{name},1\n")
    with pytest.raises(mb.InputError, match="named, but not among the images"):
        load(tmp_path / "in", classes=("cat", "dog"))
