"""Optimal transport between samples: torch alone, importable without Lightning."""

__all__: list[str] = []
