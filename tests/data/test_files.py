"""Data from parquet files, image folders and the hub, by the real client libraries."""

import errno
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from pyarrow.parquet import read_table, write_table

import mmtard_bench as mb
from mmtard_bench.data import files as outside
from mmtard_bench.data.decode import decode
from mmtard_bench.errors import DamagedImageError, StorageError
from mmtard_bench.tasks.catalogue import imagenet_folder
from mmtard_bench.tasks.samples import find_task, load_task
from tests.cli.test_bad_input import GOOD, parquet, rgb

WEIGHTS = Path(mb.__file__).parent / "models" / "weights"


def test_parquet_files_keep_bytes_labels_and_names(tmp_path):
    one = parquet(tmp_path / "a.parquet", GOOD[:2], [0, 1], ["cat", "dog"])
    parquet(tmp_path / "b.parquet", GOOD[2:], [1, 1], ["cat", "dog"])
    data = load_task(find_task(f"parquet:{tmp_path}/*.parquet"), n=None, seed=0)
    assert data.classes == ("cat", "dog")
    assert sorted(zip(data.manifest.ids, data.labels, strict=True)) == [
        ("00000000", 0),
        ("00000001", 1),
        ("00000002", 1),
        ("00000003", 1),
    ]
    for row, i in enumerate(data.manifest.indices):
        assert np.array_equal(data.pixels(row), decode(GOOD[i], "x", convert_rgb=False))
    assert load_task(find_task(one), n=None, seed=0).revision != data.revision


def test_the_revision_follows_the_content(tmp_path):
    spec = parquet(tmp_path / "a.parquet", GOOD, [0, 1, 0, 1], ["cat", "dog"])
    first = load_task(find_task(spec), n=None, seed=0).revision
    parquet(tmp_path / "a.parquet", [*GOOD[:3], rgb(9)], [0, 1, 0, 1], ["cat", "dog"])
    assert load_task(find_task(spec), n=None, seed=0).revision != first


def test_image_folders_name_their_samples_by_path(tmp_path):
    for i, data in enumerate(GOOD):
        folder = tmp_path / "pets" / ("cat" if i % 2 == 0 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(data)
    task = find_task(f"imagefolder:{tmp_path / 'pets'}")
    data = load_task(task, n=None, seed=0)
    assert data.classes == ("cat", "dog")
    assert dict(zip(data.manifest.ids, data.labels, strict=True)) == {
        "cat/0.png": 0,
        "dog/1.png": 1,
        "cat/2.png": 0,
        "dog/3.png": 1,
    }
    # Where the folder lies does not matter; what is in it does.
    shutil.copytree(tmp_path / "pets", tmp_path / "copy")
    copy = load_task(find_task(f"imagefolder:{tmp_path / 'copy'}"), n=None, seed=0)
    assert (copy.revision, copy.manifest) == (data.revision, data.manifest)
    (tmp_path / "copy" / "cat" / "0.png").write_bytes(rgb(77))
    changed = load_task(find_task(f"imagefolder:{tmp_path / 'copy'}"), n=None, seed=0)
    assert changed.revision != data.revision


def test_pixels_survive_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    from tests.cli.test_bad_input import encode

    assert np.array_equal(decode(encode(Image.fromarray(pixels)), "x", convert_rgb=False), pixels)


def test_sixteen_bit_colour_is_not_taken_for_eight(tmp_path):
    """Pillow reads a 16-bit RGB PNG as 8-bit without a word: only the header tells."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(12)) * 2)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(mb.InputError, match="16-bit"):
        decode(png, "x", convert_rgb=False)


def test_imagenet_folders_must_be_named_by_wordnet_ids(tmp_path):
    """Sorted, only those are in the order of the class names."""
    for number in range(1000):
        folder = tmp_path / "named" / f"class {number}"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(GOOD[0])
    task = replace(imagenet_folder("imagenet", ""), data=f"imagefolder:{tmp_path / 'named'}")
    with pytest.raises(mb.InputError, match=r"WordNet ids.*'class 0'.*n01440764"):
        load_task(task, n=2, seed=0)
    for number in range(1000):
        (tmp_path / "named" / f"class {number}").rename(tmp_path / "named" / f"n{number:08d}")
    with pytest.warns(UserWarning, match="missile, sunglasses"):
        data = load_task(task, n=1000, seed=0)
    by_id = dict(zip(data.manifest.ids, data.labels, strict=True))
    assert by_id["n00000417/a.png"] == 417


def test_a_replaced_file_is_read_again_whatever_its_path_and_time(tmp_path):
    """As copies with fixed times leave them: the library's cache knows no more of a file."""
    path = tmp_path / "a.parquet"
    for seed in (1, 2, 1):
        images = [rgb(seed + i) for i in range(2)]
        task = find_task(parquet(path, images, [seed % 2, 0], ["cat", "dog"]))
        os.utime(path, (1e9, 1e9))
        data = load_task(task, n=None, seed=0)
        by_id = dict(zip(data.manifest.ids, data.labels, strict=True))
        assert by_id == {"00000000": seed % 2, "00000001": 0}
        for row, i in enumerate(data.manifest.indices):
            assert np.array_equal(data.pixels(row), decode(images[i], "x", convert_rgb=False))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    task = find_task(parquet(tmp_path / "a.parquet", GOOD, [0, 1, 0, 1], ["cat", "dog"]))
    later = outside.load_table

    def change(task: mb.Task, builder: str, **arguments: object) -> object:
        parquet(tmp_path / "a.parquet", GOOD[::-1], [1, 1, 1, 1], ["cat", "dog"])
        return later(task, builder, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(outside, "load_table", change)
        with pytest.raises(mb.InputError, match="or they changed meanwhile"):
            load_task(task, n=None, seed=0)
    assert load_task(task, n=None, seed=0).labels == (1, 1, 1, 1)


def test_every_pattern_counts_and_no_file_twice(tmp_path):
    for name in ("a1", "a2", "[b]"):
        parquet(tmp_path / f"{name}.parquet", GOOD[:1], [0], ["cat", "dog"])
    task = find_task(f"parquet:{tmp_path}/a*.parquet,{tmp_path}/[b].parquet")
    assert len(load_task(task, n=None, seed=0).labels) == 3
    with pytest.raises(mb.InputError, match=r"a1\.parquet twice"):
        load_task(find_task(f"parquet:{tmp_path}/a1.parquet,{tmp_path}/a*.parquet"), n=1, seed=0)
    with pytest.raises(mb.InputError, match=r"no file .*/c\*\.parquet"):
        load_task(find_task(f"parquet:{tmp_path}/a1.parquet,{tmp_path}/c*.parquet"), n=1, seed=0)


def stored(path: Path, **images: object) -> str:
    """A parquet file of one row with these columns of images, as they are stored."""
    features = {name: datasets.Image() for name in images}
    features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    schema = datasets.Features(features).arrow_schema
    write_table(pyarrow.Table.from_pylist([{**images, "label": 0}], schema=schema), path)
    return f"parquet:{path}"


def test_only_bytes_in_a_table_are_read(tmp_path):
    """Its author would choose what is read here; a pipe never ends."""
    (tmp_path / "local.png").write_bytes(GOOD[0])
    os.mkfifo(tmp_path / "pipe")
    for name in ("local.png", "pipe", "gone.png"):
        image = {"bytes": None, "path": str(tmp_path / name)}
        task = find_task(stored(tmp_path / "a.parquet", image=image))
        with pytest.raises(mb.InputError, match=r"names the file .*Only bytes in the data") as e:
            load_task(task, n=None, seed=0).pixels(0)
        # As damage it would be left out on request.
        assert not isinstance(e.value, DamagedImageError)


@pytest.mark.parametrize("column", ["mask", "id"])
def test_other_columns_are_not_opened(tmp_path, column):
    os.mkfifo(tmp_path / "pipe")
    image = {"bytes": GOOD[0], "path": None}
    pipe = {"bytes": None, "path": str(tmp_path / "pipe")}
    spec = stored(tmp_path / "a.parquet", image=image, **{column: pipe})
    data = load_task(find_task(spec), n=None, seed=0)
    assert np.array_equal(data.pixels(0), decode(GOOD[0], "x", convert_rgb=False))
    with pytest.raises(mb.InputError, match="expected whole numbers"):
        task = replace(find_task(spec), label_column=column, classes=("cat", "dog"))
        load_task(task, n=None, seed=0)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Not enough disk space. Needed: 3 GB"),
        DatasetGenerationError("An error occurred while generating the dataset"),
        PermissionError(errno.EACCES, "Permission denied", "CACHE/x"),
    ],
    ids=["full", "too small", "wrapped", "denied"],
)
def test_a_cache_that_cannot_be_written_is_not_the_files_fault(tmp_path, monkeypatch, error):
    task = find_task(parquet(tmp_path / "a.parquet", GOOD, [0, 1, 0, 1], ["cat", "dog"]))
    if isinstance(error, DatasetGenerationError):
        error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    elif error.filename:
        error.filename = f"{datasets.config.HF_DATASETS_CACHE}/x"

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(StorageError, match=r"cache .* could not be written: .*set HF_HOME"):
        load_task(task, n=None, seed=0)


def test_lists_of_numbers_are_pixels_of_8_bits(tmp_path):
    def pixel(value: int, kind: pyarrow.DataType) -> int:
        image = np.full((4, 4, 3), value).tolist()
        nested = pyarrow.list_(pyarrow.list_(pyarrow.list_(kind)))
        columns = {"image": pyarrow.array([image], nested), "label": [0]}
        write_table(pyarrow.table(columns), tmp_path / "x.parquet")
        task = mb.Task("t", f"parquet:{tmp_path}/x.parquet", ("{}",), classes=("a", "b"))
        return int(load_task(task, n=None, seed=0).pixels(0)[0, 0, 0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, which says that it changes the type
        assert pixel(255, pyarrow.int64()) == pixel(255, pyarrow.uint8()) == 255
        for value in (256, -1):  # which the library makes 0 and 255
            with pytest.raises(mb.InputError, match=f"numbers from {value} to {value}"):
                pixel(value, pyarrow.int64())


def test_a_part_without_rows_is_no_obstacle(tmp_path):
    stored(tmp_path / "1.parquet", image={"bytes": GOOD[0], "path": None})
    full = read_table(tmp_path / "1.parquet")
    write_table(full.slice(0, 0), tmp_path / "0.parquet")
    task = mb.Task("t", f"parquet:{tmp_path}/*.parquet", ("{}",))
    assert load_task(task, n=None, seed=0).labels == (0,)
    with pytest.raises(mb.InputError, match="is empty"):
        load_task(replace(task, data=f"parquet:{tmp_path}/0.parquet"), n=None, seed=0)
