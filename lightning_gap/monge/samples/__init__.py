"""From arrays, frames and files of samples to the batches that a map is trained on."""

__all__: list[str] = []
