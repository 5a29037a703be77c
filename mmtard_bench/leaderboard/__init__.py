"""The leaderboard: entries, their verification, and the tables and page made from them.

Read ``board.py`` (what a leaderboard consists of), then ``standings.py`` (order and places).
``entries/`` is what people submit, ``verify/`` checks it, ``page/`` renders it.
"""
