"""Train robust students: MMT-ARD and its baselines, from a recipe to a checkpoint.

Read ``recipe.py`` (what a run is made of), then ``session.py`` (the run) and ``methods/`` (one
file per loss). ``study/`` repeats a method over seeds; ``make/`` builds the weights that ship.
"""
