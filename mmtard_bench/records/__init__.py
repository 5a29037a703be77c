"""Records: what is known after one evaluation, per sample. Imports without torch.

Read ``schema.py`` first, then ``files.py``. The other modules derive from records: worst cases,
intervals, comparisons, curves, tables and figures.
"""
