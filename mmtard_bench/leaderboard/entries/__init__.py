"""Entries: model cards and packed records that people submit. Imports without torch.

Read ``folder.py`` first (the files of an entry), then ``card.py`` and ``submit.py``.
"""
