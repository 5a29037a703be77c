"""Verify an entry without trusting it, in four levels. Read ``levels.py`` first."""
