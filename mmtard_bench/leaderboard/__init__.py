"""The leaderboard: entries, their verification, and the tables and page made from them.

Read ``board.py`` (the contents of a leaderboard), then ``standings.py`` (order and places).
``entries/`` holds what people submit, ``verify/`` checks it, ``page/`` renders it.
"""
