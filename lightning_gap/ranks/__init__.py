"""Groups of ranks, what they exchange, and tensors in shards: torch.distributed alone, no Lightning."""

__all__: list[str] = []
