"""Networks that map samples to samples: torch alone, importable without Lightning."""

__all__: list[str] = []
