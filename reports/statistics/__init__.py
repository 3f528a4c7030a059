"""Fits, intervals, ratios of turns: numbers from numbers."""
