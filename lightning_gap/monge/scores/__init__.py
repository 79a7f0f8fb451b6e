"""How good a transport map is: metrics that add up over batches and processes."""

__all__: list[str] = []
