"""Sinkhorn updates in one compiled pass over all pairs, for costs that have a formula."""

__all__: list[str] = []
