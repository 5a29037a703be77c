"""A study: methods x seeds, scored and compared. Read ``run.py`` first."""
