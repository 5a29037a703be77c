"""CLIP-like models: load them by name, from checkpoints or from memory.

A ``Clip`` has an image tower, a text tower and a preprocessing. Read ``clip.py`` first, then
``loading.py``, which finds a model for a spec such as ``ViT-B-32:openai``.
"""
