"""Seconds and memory, always as ratios of what ran in turns within one run."""
