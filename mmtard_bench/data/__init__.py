"""Labelled or captioned images: the digits that ship, folders, parquet, WebDataset, the hub.

A ``Dataset`` gives 8-bit images by position; ``manifest.py`` draws the samples of an evaluation.
Read ``base.py`` first.
"""
