"""Score a model: a job is judged, attacked batch by batch, confirmed, and becomes a record.

Read ``evaluate.py`` first (one record), then ``loop.py`` (its batches) and ``run.py`` (a suite,
which can be stopped and resumed).
"""
