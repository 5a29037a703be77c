"""The digits world: real handwritten digits in colour, embedded, the same bytes everywhere.

The 1,797 digits of scikit-learn (Alpaydin and Kaynak, 1998; UCI "Optical Recognition of
Handwritten Digits"), 8 x 8 pixels with 17 grey levels, are rendered to 32 x 32 RGB: an ink colour
on a background colour, rotated, scaled, shifted, with light noise. Every choice is read from a
SHAKE-256 stream of the sample id and the rendering is in integers, so no random generator,
floating-point unit or library version can change a byte.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mmtard_bench.data.base import Pixels
from mmtard_bench.registry import register_dataset

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (45, 165, 65),
    "blue": (45, 75, 215),
    "yellow": (240, 220, 60),
    "purple": (140, 50, 180),
    "orange": (240, 140, 35),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
INK_CAPTION = "a photo of a {ink} {digit} on a {background} background"

Combination = tuple[str, int, str]
"""(ink, digit, background)."""

_NOISE = 6  # grey levels, uniform in [-6, 6]
_TEST_SHARE = 5  # one source digit in five is for testing
_UNSEEN_SHARE = 5  # one combination in five never occurs in training
# cos and sin of -20 to 20 degrees in 1/65536, rounded once: far from any tie, so that no
# machine's libm can round them another way.
_ANGLES = np.arange(-20, 21)
_COS = np.rint(np.cos(np.deg2rad(_ANGLES)) * 65536).astype(np.int64)
_SIN = np.rint(np.sin(np.deg2rad(_ANGLES)) * 65536).astype(np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def caption(combination: Combination) -> str:
    """The caption of a combination, e.g. "a photo of a red seven on a blue background"."""
    ink, digit, background = combination
    return INK_CAPTION.format(ink=ink, digit=DIGITS[digit], background=background)


@cache
def combinations(*, seen: bool) -> tuple[Combination, ...]:
    """The (ink, digit, background) combinations that training uses (448), or never sees (112)."""
    every = [
        (ink, digit, background)
        for ink in COLOURS
        for digit in range(10)
        for background in COLOURS
        if ink != background
    ]
    ranked = sorted(every, key=lambda c: _hash(f"digits combination {caption(c)}"))
    cut = len(every) // _UNSEEN_SHARE
    return tuple(sorted(ranked[cut:] if seen else ranked[:cut]))


@cache
def sources(*, train: bool) -> tuple[int, ...]:
    """Positions of scikit-learn's digits that training, or testing, is rendered from."""
    chosen = (i for i in range(1797) if (_hash(f"digits source {i}") % _TEST_SHARE != 0) == train)
    return tuple(chosen)


@cache
def _source_digits() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.int64), bunch.target.astype(np.int64)


@cache
def _sources_by_digit(train: bool) -> tuple[tuple[int, ...], ...]:
    targets = _source_digits()[1]
    chosen = sources(train=train)
    return tuple(tuple(i for i in chosen if targets[i] == digit) for digit in range(10))


@dataclass(frozen=True)
class DigitsSplit:
    """A split of the digits world; implements ``Dataset`` and ``CaptionedDataset``.

    ``labels`` count the combinations in the order of ``class_captions`` if ``by_caption``,
    else the digit, 0 to 9.
    """

    name: str
    size: int
    train: bool
    combinations: tuple[Combination, ...]
    by_caption: bool

    @property
    def revision(self) -> str:
        return f"digits-1:{self.name}:{self.size}"

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{self.name}/{i:05d}" for i in range(self.size))

    @property
    def labels(self) -> tuple[int, ...]:
        places = (self._place(i) for i in range(self.size))
        return tuple(p if self.by_caption else self.combinations[p][1] for p in places)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(caption(c) for c in self.combinations) if self.by_caption else DIGITS

    def combination(self, index: int) -> Combination:
        """The (ink, digit, background) of a sample."""
        return self.combinations[self._place(index)]

    def captions(self, index: int) -> tuple[str, ...]:
        """The one caption of a sample."""
        return (caption(self.combination(index)),)

    def image(self, index: int) -> Pixels:
        return _render(f"{self.name}/{index:05d}", self.combination(index), train=self.train)

    def ink(self, index: int) -> NDArray[np.bool_]:
        """The pixels of a sample, (32, 32), where the ink covers at least half of the paper."""
        _, digit, _ = self.combination(index)
        share: NDArray[np.int64] = _ink(f"{self.name}/{index:05d}", digit, train=self.train)
        return share >= 2048

    def _place(self, index: int) -> int:
        return _hash(f"combination of {self.name}/{index:05d}") % len(self.combinations)


def _render(sample: str, combination: Combination, *, train: bool) -> Pixels:
    """Draw one sample: (32, 32, 3) uint8, a function of its id and combination."""
    ink, digit, background = combination
    ink_share = _ink(sample, digit, train=train)[..., None]
    paint = np.array(COLOURS[ink], dtype=np.int64)
    paper = np.array(COLOURS[background], dtype=np.int64)
    stream = _stream(sample)[10:]
    noise = np.frombuffer(stream, dtype=np.uint8).astype(np.int64) % (2 * _NOISE + 1) - _NOISE
    image = (paper * (4096 - ink_share) + paint * ink_share + 2048) // 4096
    return np.clip(image + noise.reshape(SIZE, SIZE, 3), 0, 255).astype(np.uint8)


def _stream(sample: str) -> bytes:
    """The bytes that decide how a sample is drawn: 10 for the glyph, then one for each value."""
    return hashlib.shake_256(f"digits render {sample}".encode()).digest(10 + SIZE * SIZE * 3)


def _ink(sample: str, digit: int, *, train: bool) -> NDArray[np.int64]:
    """How much of each pixel the ink covers, (32, 32), 0 to 4096."""
    choice = np.frombuffer(_stream(sample)[:10], dtype=">u2").astype(np.int64)
    pool = _sources_by_digit(train)[digit]
    glyph = _source_digits()[0][pool[choice[0] % len(pool)]]

    angle = choice[1] % len(_ANGLES)
    # Source pixels per output pixel in 1/65536: the digit covers 19 to 28 of the 32 pixels.
    step = 8 * 65536 // (19 + choice[2] % 10)
    shift = (choice[3:5] % 7) - 3
    grid = np.arange(SIZE, dtype=np.int64) * 2 - (SIZE - 1)  # twice the offset from the centre
    rows, columns = grid[:, None] - 2 * shift[0], grid[None, :] - 2 * shift[1]
    # Rotate, scale, and move to glyph coordinates (pixel centres at whole numbers), in 1/65536.
    y = ((_COS[angle] * rows - _SIN[angle] * columns) * step >> 17) + 7 * 32768
    x = ((_SIN[angle] * rows + _COS[angle] * columns) * step >> 17) + 7 * 32768
    return _bilinear(glyph, y, x)


def _bilinear(
    glyph: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Sample an 8 x 8 glyph (0 to 16) at fixed-point places (1/65536); 0 outside; 0 to 4096."""
    padded = np.zeros((12, 12), dtype=np.int64)
    padded[2:10, 2:10] = glyph
    top, left = np.clip(y >> 16, -2, 8), np.clip(x >> 16, -2, 8)
    down, right = (y & 65535) >> 8, (x & 65535) >> 8
    top, left = top + 2, left + 2
    upper = padded[top, left] * (256 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (256 - right) + padded[top + 1, left + 1] * right
    sampled: NDArray[np.int64] = (upper * (256 - down) + lower * down) * 4096 // (16 * 65536)
    return sampled


def digits_train(size: int = 60000) -> DigitsSplit:
    """Training images: training sources, seen combinations only."""
    return DigitsSplit("digits/train", size, True, combinations(seen=True), by_caption=True)


@register_dataset("digits/train")
def digits_train_20000() -> DigitsSplit:
    """20,000 training images of the 448 combinations that training uses, by combination."""
    return digits_train(20000)


@register_dataset("digits/validation")
def digits_validation() -> DigitsSplit:
    """2,000 more images from the sources and combinations of training, labelled by digit."""
    return DigitsSplit("digits/validation", 2000, True, combinations(seen=True), by_caption=False)


@register_dataset("digits/test")
def digits_test() -> DigitsSplit:
    """2,000 test images over all 560 combinations, labelled by digit."""
    every = tuple(sorted(combinations(seen=True) + combinations(seen=False)))
    return DigitsSplit("digits/test", 2000, False, every, by_caption=False)


@register_dataset("digits/unseen")
def digits_unseen() -> DigitsSplit:
    """2,000 test images of the 112 combinations that training never shows."""
    return DigitsSplit("digits/unseen", 2000, False, combinations(seen=False), by_caption=True)
