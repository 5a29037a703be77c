"""Text from strangers: what a name, a sentence and an address may be."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter

from mmtard_bench.schema import explained

_FORMATTING = set("<>|`[]\\")
# Letters, marks and symbols that show nothing (Unicode's Default_Ignorable_Code_Point, outside of
# the category C; and the blank of Braille).
_UNSEEN = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
_UNSEEN |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
_LOOK_ALIKES = str.maketrans({"0": "o", "1": "l", "i": "l", "5": "s", "2": "z", "8": "b"})


def _plain(text: str) -> str:
    for character in text:
        # Control and format characters hide text or turn its direction; Z are other spaces.
        hidden = character != " " and unicodedata.category(character)[0] in "CZ"
        if hidden or character in _FORMATTING or ord(character) in _UNSEEN:
            raise ValueError(
                f"U+{ord(character):04X} is not allowed; expected a line of plain text without "
                "< > | ` [ ] \\ and invisible characters"
            )
    if text != text.strip():
        raise ValueError("expected no space at its ends")
    # Markdown makes links of them by itself.
    if "://" in text or "www." in text.casefold():
        raise ValueError("an address is not allowed here; expected plain text")
    return text


def _address(text: str) -> str:
    if not re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[A-Za-z0-9._~/%?=&+:@,;-]*)?", text):
        raise ValueError("expected an https:// address without characters that format")
    return text


Plain = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_plain)]
"""A line of text that formats nothing, in markdown, HTML or a terminal."""

Url = Annotated[str, Field(max_length=300), AfterValidator(_address)]

EntryName = Annotated[str, Field(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", max_length=64)]
"""An entry's name is its directory's: no letter case, nothing but ASCII, no path."""

SuiteName = Annotated[str, Field(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*-v[0-9]+$", max_length=64)]

_PLAIN = TypeAdapter[str](Plain)
_URL = TypeAdapter[str](Url)


def require_plain(text: str, what: str) -> str:
    """The text, if it is ``Plain``. Raises InputError, with what it is called, if not."""
    return _checked(_PLAIN, text, what)


def require_url(text: str, what: str) -> str:
    """The text, if it is a ``Url``. Raises InputError, with what it is called, if not."""
    return _checked(_URL, text, what)


def _checked(kind: TypeAdapter[str], text: str, what: str) -> str:
    with explained(f"{what} {text[:80]!r} is not allowed"):
        return kind.validate_python(text)


def skeleton(name: str) -> str:
    """What is left of an entry's name when characters that look alike are one; see UTS 39."""
    return re.sub(r"[._-]", "", name).translate(_LOOK_ALIKES).replace("rn", "m").replace("vv", "w")
