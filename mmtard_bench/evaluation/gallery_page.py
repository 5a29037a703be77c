"""A gallery as a page or as a picture."""

import base64
import io
import textwrap
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.gallery import (
    Gallery,
    Pixels,
    facts,
    panels,
    summary_of,
    title_of,
)
from mmtard_bench.files import write_atomically
from mmtard_bench.text import printable

SMALL = 160
"""Images up to this many pixels on a side are enlarged with their pixels as squares."""
FORMATS = (".html", ".png")


def write_gallery(gallery: Gallery, path: Path) -> None:
    """Write a page (.html) or a picture (.png). Raises InputError for any other name."""
    require_format(path)
    page = path.suffix == ".html"
    write_atomically(path, to_html(gallery) if page else to_png(gallery))


def require_format(path: Path) -> None:
    """Raise InputError unless the name ends in .html or .png."""
    if path.suffix not in FORMATS:
        raise InputError(
            f"{path} is neither a page nor a picture; expected {' or '.join(FORMATS)}."
        )


def to_png(gallery: Gallery) -> bytes:
    """A picture with a row per sample: its images and its facts."""
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
    environment = Environment(
        autoescape=True,
        finalize=lambda value: printable(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = files("mmtard_bench.evaluation").joinpath("gallery.html").read_text("utf-8")
    samples = [
        {
            "name": shown.sample.id,
            "images": [
                {
                    "title": title,
                    "small": _small(pixels),
                    "source": _data_uri(pixels),
                    "height": pixels.shape[0],
                    "width": pixels.shape[1],
                }
                for title, pixels in panels(shown)
            ],
            "facts": facts(gallery, shown),
        }
        for shown in gallery.shown
    ]
    return environment.from_string(template).render(
        title=title_of(gallery), summary=summary_of(gallery), samples=samples
    )


def _data_uri(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
