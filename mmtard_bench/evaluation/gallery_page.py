"""A gallery as a page or as a picture."""

import base64
import io
import textwrap
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.gallery import (
    Gallery,
    Pixels,
    Shown,
    facts,
    panels,
    summary_of,
    title_of,
)
from mmtard_bench.files import write_atomically
from mmtard_bench.text import printable

SMALL = 160
"""Pixels of a side up to which an image is enlarged with its pixels as squares."""
FORMATS = (".html", ".png")


def write_gallery(gallery: Gallery, path: Path) -> None:
    """Write a page (.html) or a picture (.png). Raises InputError for another ending."""
    require_format(path)
    page = path.suffix == ".html"
    write_atomically(path, to_html(gallery) if page else to_png(gallery))


def require_format(path: Path) -> None:
    """Raise InputError unless a gallery can be written to a file of that name."""
    if path.suffix not in FORMATS:
        raise InputError(
            f"{path} is neither a page nor a picture; expected {' or '.join(FORMATS)}."
        )


def to_png(gallery: Gallery) -> bytes:
    """A picture: a row a sample, its images and what is said of it."""
    rows = len(gallery.shown)
    figure = Figure(figsize=(11, 1.9 * rows + 1.1), layout="constrained")
    heading = "\n".join([title_of(gallery), *textwrap.wrap(summary_of(gallery), 130)])
    figure.suptitle(_line(heading), fontsize=10, parse_math=False)
    grid = figure.subplots(rows, 4, squeeze=False, width_ratios=[1, 1, 1, 2.4])
    for axes, shown in zip(grid, gallery.shown, strict=True):
        for place in axes:
            place.set_axis_off()
        for place, (title, pixels) in zip(axes, panels(shown), strict=False):
            place.imshow(pixels, interpolation="nearest" if _small(pixels) else "antialiased")
            place.set_title(title, fontsize=8, parse_math=False)
        lines = [("sample", shown.sample.id), *facts(gallery, shown)]
        text = "\n".join(textwrap.shorten(_line(f"{a}: {b}"), 75) for a, b in lines)
        axes[3].text(0, 0.5, text, va="center", fontsize=8, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _small(pixels: Pixels) -> bool:
    sides: tuple[int, ...] = pixels.shape[:2]
    return max(sides) <= SMALL


def _line(text: str) -> str:
    return printable(text).replace("\t", " ")


def to_html(gallery: Gallery) -> str:
    """A page in one file: no script, nothing loaded, all text escaped."""
    cards = "\n".join(_card(gallery, shown) for shown in gallery.shown)
    return _PAGE.format(
        style=_STYLE,
        title=_text(title_of(gallery)),
        summary=_text(summary_of(gallery)),
        cards=cards,
    )


def _card(gallery: Gallery, shown: Shown) -> str:
    name = shown.sample.id
    images = "".join(
        f'<figure><img{" class=small" if _small(pixels) else ""} src="{_data_uri(pixels)}" '
        f'width="{pixels.shape[1]}" height="{pixels.shape[0]}" alt="{_text(f"{title}: {name}")}">'
        f"<figcaption>{_text(title)}</figcaption></figure>"
        for title, pixels in panels(shown)
    )
    rows = "".join(
        f"<dt>{_text(what)}</dt><dd>{_text(said)}</dd>" for what, said in facts(gallery, shown)
    )
    return (
        f"<article><h2>{_text(name)}</h2>"
        f'<div class="images">{images}</div><dl>{rows}</dl></article>'
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _data_uri(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem;
  padding: 0 1rem; background: light-dark(#fff, #14161a); color: light-dark(#1b1d21, #e6e7ea); }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
h2 { font-size: .95rem; margin: 0 0 .6rem; }
h1, h2, dd { overflow-wrap: anywhere; }
main { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
article { border: 1px solid light-dark(#d5d8de, #363a42); border-radius: .5rem; padding: .9rem; }
.images { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
figure { margin: 0; }
figcaption { font-size: .8rem; color: light-dark(#555b66, #a3a9b5); }
img { display: block; width: 100%; height: auto; }
img.small { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .8rem 0 0; }
dt { color: light-dark(#555b66, #a3a9b5); }
dd { margin: 0; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<main>
{cards}
</main>
</body>
</html>
"""
