"""Accuracy: the papers' tables, known maps, real data."""
