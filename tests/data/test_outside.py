"""Data from parquet files, image folders and the hub, by the real client libraries."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmtard_bench as mb
from mmtard_bench.data.decode import decode
from mmtard_bench.tasks.hub_tasks import imagenet_folder
from mmtard_bench.tasks.resolve import find_task, load_task
from tests.test_bad_input import GOOD, parquet, rgb

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
    from tests.test_bad_input import encode

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
