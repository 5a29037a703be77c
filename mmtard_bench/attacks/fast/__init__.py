"""The fast engine: the same attacks as the reference libraries, with settled samples left out.

Read ``passes.py`` (one forward and backward pass), then ``rows.py`` (which samples share a batch)
and ``ensemble.py`` (which attack follows which).
"""
