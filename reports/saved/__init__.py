"""Reads what was saved: timed runs, and every other document."""
