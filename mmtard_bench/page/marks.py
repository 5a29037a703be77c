"""The marks of plots, the same on the page and in SVG files."""

SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # a circle
    "M-4-4H4V4H-4z",
    "M0-5.5L5 4H-5z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "M0 5.5L5-4H-5z",
    "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7z",  # a plus
    "M-5-2.5L-2.5-5L0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0z",  # a cross
)
"""Outlines around the origin, about 10 wide. A row's is filled in the first round, then hollow."""

COLOURS = 6
"""How many ``--series-N`` the style sheet has; not a multiple of the shapes, so that both vary."""
