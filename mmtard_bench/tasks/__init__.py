"""Zero-shot tasks: a data set, class names and prompt templates, and how an answer is scored.

Suites and protocols are lists of tasks and threat models. Read ``catalogue.py`` for the tasks that
ship, ``samples.py`` for how one is loaded, ``scoring.py`` for when a sample is correct.
"""
