"""A tar file of samples: every member is part of one, or named in an error."""

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from mmtard_bench.data.decode import IMAGE_EXTENSIONS
from mmtard_bench.errors import InputError
from mmtard_bench.files import is_text

COMPANIONS = frozenset(("cls", "txt", "json", "npy"))
"""How members beside an image may end that say more of it than is used."""

_BLOCK = 512
_LONGEST_TEXT = 1 << 16


@dataclass(frozen=True)
class Place:
    """What a shard says of a sample, and where its image is: first byte and length.

    ``text`` is its label, in digits, or its captions.
    """

    text: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """A tar file of samples, by key, in their order."""

    path: Path
    places: dict[str, Place]

    def image(self, key: str) -> bytes:
        """The image file of a sample."""
        place = self.places[key]
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)


def read_shard(path: Path, what: str, *, texts: str = "cls") -> Shard:
    """The table of contents of a shard. Raises InputError if it is damaged or not of the layout."""
    try:
        members = _members(path)
        found, images = _pairs(path, members, texts)
    except (OSError, tarfile.TarError, ValueError) as error:
        start = path.read_bytes()[:40] if path.is_file() else b""
        looks = f" It begins with {start!r}: no tar archive." if start[:1] == b"<" else ""
        raise InputError(
            f"{what} is damaged, or not in the layout of CLIP_benchmark: {error}.{looks} Delete it "
            "(mmtard-bench fetch does that where the hub states a checksum) and run the same "
            "command again."
        ) from error
    return Shard(path, {key: Place(found[key], *images[key]) for key in images})


def _members(path: Path) -> list[tarfile.TarInfo]:
    """The members of a whole, uncompressed tar file."""
    with tarfile.open(path, "r:") as archive:
        members = archive.getmembers()
    end = max((m.offset_data + -(-m.size // _BLOCK) * _BLOCK for m in members), default=0)
    with path.open("rb") as file:
        file.seek(end)
        # Two blocks of zeros end an archive. tarfile takes a file that is cut between members.
        if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
            raise ValueError("it is cut short")
        # Nor does tarfile look behind the end, where cat puts the next archive.
        while behind := file.read(1 << 20):
            if any(behind):
                raise ValueError("there is more behind its end, as of archives joined by cat")
    return members


def _pairs(
    path: Path, members: list[tarfile.TarInfo], texts: str
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Texts of samples, from members of that kind, and where images are, by key.

    Raises ValueError unless every member is part of a sample that has both.
    """
    found: dict[str, str] = {}
    images: dict[str, tuple[int, int]] = {}
    keys, strange = set(), []
    with path.open("rb") as file:
        for member in members:
            key, _, kind = member.name.rpartition(".")
            kind = kind.lower()
            if member.isdir():
                continue
            if not _is_sample(member, key, kind):
                strange.append(member.name)
                continue
            keys.add(key)
            if key in (found if kind == texts else images) and kind in (texts, *IMAGE_EXTENSIONS):
                raise ValueError(f"it holds the sample '{key}' twice")
            if kind in IMAGE_EXTENSIONS:
                images[key] = (member.offset_data, member.size)
            elif kind == texts:
                file.seek(member.offset_data)
                found[key] = _text(file.read(min(member.size, _LONGEST_TEXT + 1)), key, kind)
    for key in sorted(keys):
        if key not in found or key not in images:
            raise ValueError(f"of the sample '{key}' there is only .{texts} or only the image")
    if strange:
        raise ValueError(f"it holds {strange[0]!r}, which is not part of a sample")
    return found, images


def _is_sample(member: tarfile.TarInfo, key: str, kind: str) -> bool:
    """Whether a member is a plain file KEY.KIND of a kind that samples have."""
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
    named = is_text(key) and not key.endswith("/") and key != ""
    return plain and named and kind in (*COMPANIONS, *IMAGE_EXTENSIONS)


def _text(text: bytes, key: str, kind: str) -> str:
    text = text.strip()
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"the text of '{key}' is longer than {_LONGEST_TEXT} bytes")
    if kind == "cls" and not re.fullmatch(rb"\d{1,9}", text):
        raise ValueError(f"the label of '{key}' is {text[:20]!r}, not a whole number")
    return text.decode("utf-8")
