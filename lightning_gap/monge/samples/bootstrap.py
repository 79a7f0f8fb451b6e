"""Resampled training samples: the same data as they might have been."""

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.samples.datamodule import SamplesDataModule
from lightning_gap.monge.samples.draws import FiniteSamples, Population, generator

__all__ = ["bootstrap"]

# First entry of the keys of these draws.
_BOOTSTRAP = 30


def bootstrap(data: SamplesDataModule, seed: int) -> SamplesDataModule:
    """Return a data module whose training samples are drawn from those of another, with replacement, as many.

    Each side of each condition is resampled on its own, with its weights (Efron 1979, "Bootstrap Methods: Another Look
    at the Jackknife"). What is held out, the representation and all options stay, but for the order of the batches. A
    side that is drawn anew for each batch, by a sampler or a stream, gives other samples.

    Args:
        data: The data module, which is left as it is.
        seed: Of the draw.

    Raises:
        TypeError: ``data`` is no :class:`SamplesDataModule`, or ``seed`` no integer.

    Example:
        >>> import torch
        >>> from lightning_gap import SamplesDataModule
        >>> data = SamplesDataModule(torch.arange(100.0)[:, None], torch.randn(80, 1), batch_size=32, val_fraction=0.0)
        >>> source, _ = bootstrap(data, seed=0).training_samples()
        >>> len(source), len(source.unique()) < 80
        (100, True)
    """
    if not isinstance(data, SamplesDataModule):
        raise TypeError(f"data must be a SamplesDataModule, got {type(data).__name__}")
    check_integer("seed", seed, 0)
    drawn: dict[int, Population] = {}  # a side without labels is in the pair of every condition, as one

    def resampled(population: Population) -> Population:
        if id(population) not in drawn:
            drawn[id(population)] = _resampled(population, seed, len(drawn))
        return drawn[id(population)]

    again = copy(data)
    for name in ("_prepared", "_as_read"):
        prepared = getattr(data, name)
        drawn.clear()
        setattr(again, name, replace(prepared, train=[(resampled(x), resampled(y)) for x, y in prepared.train]))
    again.seed = data.seed + 1 + seed
    return again


def _resampled(population: Population, seed: int, number: int) -> Population:
    if not isinstance(population, FiniteSamples):
        return population
    n = len(population)
    rows = torch.randint(n, (n,), generator=generator(seed, _BOOTSTRAP, number), device="cpu")
    rows = rows.to(population.samples.device)

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return FiniteSamples(population.samples[rows], of(population.weights), of(population.images))
