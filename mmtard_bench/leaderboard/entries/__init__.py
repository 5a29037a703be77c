"""Leaderboard entries as files that strangers write: cards, packed records, what was checked."""
