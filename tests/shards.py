"""Data sets in the WebDataset layout, made in memory."""

import io
import tarfile
from pathlib import Path

import datasets
import open_clip
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tests.cli.test_bad_input import rgb
from tests.conftest import SHARED_DATA
from tests.hub import Files

NAMES = ["cat", "dog", "hen", "cow", "eel"]
TEMPLATES = ["a photo of a {c}.", "a drawing of a {c}."]


def tar(members: dict[str, bytes]) -> bytes:
    """A tar file of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def layout(
    images: list[bytes],
    labels: list[int],
    *,
    shards: int = 1,
    names: list[str] = NAMES,
    templates: list[str] = TEMPLATES,
    kind: str = "webp",
) -> Files:
    """The files of a repository, the samples spread over shards as ShardWriter does."""
    full = -(-len(images) // shards)
    files = {
        "classnames.txt": "".join(f"{name}\n" for name in names).encode(),
        "zeroshot_classification_templates.txt": "".join(f"{t}\n" for t in templates).encode(),
        "test/nshards.txt": f"{shards}\n".encode(),
    }
    for shard in range(shards):
        members = {}
        for i in range(shard * full, min((shard + 1) * full, len(images))):
            members[f"s{i:07d}.cls"] = str(labels[i]).encode()
            members[f"s{i:07d}.{kind}"] = images[i]
        files[f"test/{shard}.tar"] = tar(members)
    return files


def write(files: Files, folder: Path) -> str:
    """The files in a folder; returns the spec."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return f"wds:{folder}"


def webp(png: bytes) -> bytes:
    """A PNG file as a lossless WebP file, as the program that made the hub's data sets does."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def noise(count: int) -> tuple[list[bytes], list[int]]:
    """Images of noise and labels."""
    return [webp(rgb(i)) for i in range(count)], [i % len(NAMES) for i in range(count)]


def cifar10(count: int) -> tuple[list[bytes], list[int], list[str]]:
    """Real images (PNG, 32 x 32), labels and class names; skips the test where there are none."""
    table = real("cifar10-test-4000.parquet", count)
    names = datasets.Features.from_arrow_schema(table.schema)["label"].names
    images = [row["bytes"] for row in table["image"].to_pylist()]
    return images, table["label"].to_pylist(), names


def imagenet(count: int) -> tuple[list[bytes], list[int], list[str]]:
    """Photographs (PNG, 299 x 299), labels and the names of their classes alone; skips likewise."""
    table = real("imagenet-nips2017-100.parquet", count)
    labels = table["label"].to_pylist()
    classes = sorted(set(labels))
    images = [row["bytes"] for row in table["image"].to_pylist()]
    names = [open_clip.IMAGENET_CLASSNAMES[label] for label in classes]
    return images, [classes.index(label) for label in labels], names


def real(name: str, count: int) -> pyarrow.Table:
    """The first rows of one of the files with real images."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"needs {name}, which is not here")
    return parquet.read_table(path).slice(0, count)
