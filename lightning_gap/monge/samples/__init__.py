"""From arrays, frames and files of samples to the batches that a map is trained on."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.monge.samples.batches import UnpairedBatch as UnpairedBatch
    from lightning_gap.monge.samples.datamodule import SamplesDataModule as SamplesDataModule
    from lightning_gap.monge.samples.standardize import AffineRepresentation as AffineRepresentation

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
