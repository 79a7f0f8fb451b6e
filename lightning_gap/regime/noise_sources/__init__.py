"""Where gradients over a second, smaller batch size come from: single examples, ghosts, micro-batches."""

__all__: list[str] = []
