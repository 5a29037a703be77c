"""Pixels are those of the image, or there is an error: formats, depths, orientation, truncation."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFile

import mmtard_bench as mb
from mmtard_bench.data import decode as module
from mmtard_bench.data.decode import decode
from mmtard_bench.errors import DamagedImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(channels: int) -> bytes:
    """A PNG of 2 x 2 with 16 bits a channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(4 * channels)) * 2)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ramp(dtype: object, kind: str = "TIFF") -> bytes:
    return encode(Image.fromarray(RAMP.astype(dtype)), kind)


@pytest.mark.parametrize(
    "data",
    [
        *map(png16, (1, 2, 3, 4)),
        ramp(np.uint16, "PNG"),
        encode(Image.fromarray(RAMP // 16), "PNG"),
        ramp(np.uint16),
        ramp(">u2"),
        ramp(np.int32),
        ramp(np.float32),
        encode(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
        ramp(np.uint16, "PPM"),
    ],
    ids=[
        *(f"PNG of {count} channels" for count in (1, 2, 3, 4)),
        "PNG",
        "12 bits in 16",
        "TIFF",
        "big-endian TIFF",
        "32-bit TIFF",
        "float TIFF",
        "float TIFF to 1",
        "PGM",
    ],
)
def test_more_than_8_bits_a_channel_are_never_clipped(data):
    for convert in (True, False):
        with pytest.raises(mb.InputError, match=r"bit|floating.*Scale it to 8 bits") as caught:
            decode(data, "x", convert_rgb=convert)
        # A sample that skip_damaged leaves out would be a number without it.
        assert not isinstance(caught.value, DamagedImageError)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP", "WEBP", "JPEG", "PPM"])
def test_8_bit_images_are_converted_as_pillow_does(kind, mode):
    try:
        data = encode(Image.fromarray(PIXELS).convert(mode), kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no {mode}")
    with Image.open(io.BytesIO(data)) as image:
        expected, is_rgb = np.array(image.convert("RGB")), image.mode == "RGB"
    assert np.array_equal(decode(data, "x", convert_rgb=True), expected)
    if not is_rgb:
        with pytest.raises(mb.InputError, match=r"expected 8-bit RGB.*convert_rgb"):
            decode(data, "x", convert_rgb=False)


def test_a_large_image_is_converted_strip_by_strip(monkeypatch):
    expected = decode(encode(Image.fromarray(PIXELS), "PNG"), "x", convert_rgb=False)
    monkeypatch.setattr(module, "_STRIP", 30)  # two rows of 14 pixels
    assert np.array_equal(
        decode(encode(Image.fromarray(PIXELS), "PNG"), "x", convert_rgb=False), expected
    )
    palette = Image.fromarray(PIXELS).convert("P")
    converted = decode(encode(palette, "PNG"), "x", convert_rgb=True)
    assert np.array_equal(converted, np.array(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_as_datasets_does(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(PIXELS), kind, exif=exif)
    expected = np.array(datasets.Image().decode_example({"bytes": data, "path": None}))
    assert np.array_equal(decode(data, "x", convert_rgb=False), expected)
    assert expected.shape == ((14, 9, 3) if orientation in (5, 6, 7, 8) else PIXELS.shape)


def test_exif_that_cannot_be_read_says_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(Image.fromarray(PIXELS), "JPEG", exif=exif))
    place = data.find(b"Exif\0\0") + 6
    data[place : place + 8] = b"nothing!"
    assert decode(bytes(data), "x", convert_rgb=False).shape == PIXELS.shape


@pytest.mark.filterwarnings("ignore")  # of Pillow, about TIFF
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("PPM", {}),
    ],
)
def test_a_truncated_image_is_damaged_whatever_other_libraries_allow(
    monkeypatch, kind, options, allowed
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", allowed)
    data = encode(Image.fromarray(PIXELS), kind, **options)
    whole = decode(data, "x", convert_rgb=True)
    for cut in range(0, len(data), 7):
        try:
            found = decode(data[:cut], "x", convert_rgb=True)
        except DamagedImageError:
            continue
        assert np.array_equal(found, whole)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is allowed


def test_settings_of_pillow_are_put_back_after_the_last_of_several_threads(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    data = encode(Image.fromarray(PIXELS), "JPEG")

    def damaged(cut: int) -> bool:
        try:
            decode(data[:cut], "x", convert_rgb=False)
        except DamagedImageError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(damaged, [len(data) // 2, len(data)] * 200))
    assert found == [True, False] * 200
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (True, 5)


def test_what_pillow_reads_beyond_the_seven_formats_is_not_opened(monkeypatch):
    """EPS would start Ghostscript."""
    image = Image.fromarray(PIXELS)
    for data in (encode(image, "EPS"), encode(image, "ICO"), encode(image, "PDF"), b"", b"<html>"):
        with pytest.raises(
            DamagedImageError, match="expected JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM"
        ):
            decode(data, "x", convert_rgb=True)


def test_the_number_of_pixels_has_a_limit_that_is_said():
    """Of 20 KB would come 500 MB; the limit is checked before anything is decoded."""
    data = encode(Image.new("1", (13_000, 13_000)), "PNG")
    with pytest.raises(mb.InputError, match=r"13000 x 13000 = 169,000,000.*at most 67,108,864"):
        decode(data, "x", convert_rgb=True)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_used_which_is_said(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    options |= {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, **options)
    with pytest.warns(UserWarning, match=f"several frames or pages .{kind}"):
        assert decode(data, "x", convert_rgb=True)[0, 0].tolist() == [255, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encode(frames[0], kind), "x", convert_rgb=True)


def test_hidden_colours_are_said():
    image = Image.fromarray(PIXELS)
    hidden = image.convert("RGBA")
    hidden.putalpha(Image.new("L", image.size, 254))
    for data in (
        encode(hidden, "PNG"),
        encode(hidden, "WEBP", lossless=True, exact=True),
        encode(image, "PNG", transparency=(1, 2, 3)),
    ):
        with pytest.warns(UserWarning, match="transparent areas"):
            assert np.array_equal(decode(data, "x", convert_rgb=True), PIXELS)
    palette = encode(image.convert("P"), "PNG", transparency=bytes([0, 255]))
    with pytest.warns(UserWarning, match="transparent areas"):
        decode(palette, "x", convert_rgb=True)
    # Opaque: nothing to say.
    assert np.array_equal(
        decode(encode(image.convert("RGBA"), "PNG"), "x", convert_rgb=True), PIXELS
    )
