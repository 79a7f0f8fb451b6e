"""The wall socket: all that is asked of Lightning, one question a function."""

__all__: list[str] = []
