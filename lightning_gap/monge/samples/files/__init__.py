"""Tables of samples, read whole or in blocks, and written in blocks."""

__all__: list[str] = []
