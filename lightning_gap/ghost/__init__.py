"""ghost."""
