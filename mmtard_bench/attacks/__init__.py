"""Attacks: algorithms that look for adversarial images or texts inside a threat model.

Read ``base.py`` first (what an attack receives and yields), then ``pgd.py``; ``catalogue.py``
registers all. ``fast/`` is the engine that attacks many samples per batch.
"""
