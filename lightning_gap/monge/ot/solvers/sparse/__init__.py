"""Exact transport over the few pairs that matter, proven over all of them."""

__all__: list[str] = []
