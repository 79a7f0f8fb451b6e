"""Solvers of entropic and exact optimal transport."""

__all__: list[str] = []
