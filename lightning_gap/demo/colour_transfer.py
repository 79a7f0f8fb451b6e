"""The transport half of the demo: give one photograph the colours of the other (Uscidda, Cuturi 2023).

Pixels are samples in the RGB cube. A map T is learned from random pixels of one photograph to random pixels of the
other, with the Monge gap and without it, and then applied to every pixel. Numbers are those of held-out pixels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_gap import MongeMap, SamplesDataModule, monge_gap, sinkhorn_divergence
from lightning_gap.demo.large_batch import Watch

__all__ = ["ColourSettings", "ColourTransfer", "Scores", "recolour", "transfer_colours"]


@dataclass(frozen=True)
class ColourSettings:
    """The configuration of the maps, fixed before any of them.

    Args:
        iterations: Optimizer steps of each map.
        learning_rate: Of Adam; it falls to zero along a cosine.
        batch_size: Pixels of each photograph in a step.
        pixels: Random pixels of each photograph to learn from.
        held_out: Other random pixels of each, for the numbers.
        gap_weights: One map each; 0 is the map without the Monge gap.
        epsilon: Regularization of the reported numbers, in squared RGB units (RGB in [0, 1]).
        seed: Of the pixels and of the networks.
    """

    iterations: int = 500
    learning_rate: float = 0.01
    batch_size: int = 256
    pixels: int = 20_000
    held_out: int = 1000
    gap_weights: tuple[float, ...] = (0.0, 1.0)
    epsilon: float = 0.005
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """How good a map is on held-out pixels."""

    divergence: float  # Sinkhorn's, between the mapped pixels and the target's
    gap: float  # debiased: 0 for an optimal map
    displacement: float  # mean ‖T(x) − x‖, the side of the RGB cube being 1


@dataclass(frozen=True)
class ColourTransfer:
    """One direction: the maps from the colours of ``source`` to those of ``target``, by the weight of the gap."""

    source: str
    target: str
    before: Scores  # of the identity
    floor: float  # divergence between two samples of the target: what a perfect map would score
    scores: dict[float, Scores]
    seconds: dict[float, float]
    pictures: dict[float, NDArray[np.uint8]]  # (height, width, 3) RGB bytes, recoloured
    images: dict[float, NDArray[np.float64]]  # of the held-out source pixels
    held_out: tuple[NDArray[np.float64], NDArray[np.float64]]  # (n, 3) pixels of source and target


def _pixels(photograph: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(photograph.reshape(-1, 3).astype(np.float32) / 255)


def _draw(photograph: NDArray[np.uint8], settings: ColourSettings, parts: int, generator: torch.Generator) -> Any:
    """Return random pixels to learn from, and ``parts`` disjoint held-out samples."""
    pixels = _pixels(photograph)
    rows = torch.randperm(len(pixels), generator=generator, device="cpu")[: settings.pixels + parts * settings.held_out]
    return pixels[rows].split([settings.pixels] + [settings.held_out] * parts)


def recolour(model: MongeMap, photograph: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the photograph with every pixel mapped; colours that leave the RGB cube are clipped."""
    mapped = model.transport(_pixels(photograph)).clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.asarray(mapped.numpy().reshape(photograph.shape))


def _score(before: Tensor, after: Tensor, target: Tensor, epsilon: float) -> Scores:
    return Scores(
        divergence=float(sinkhorn_divergence(after, target, epsilon=epsilon)),
        gap=float(monge_gap(before, after, epsilon=epsilon, convention="debiased")),
        displacement=float((after - before).norm(dim=1).mean()),
    )


def fit_map(
    source: Tensor, target: Tensor, gap_weight: float, settings: ColourSettings, tick: Callable[[int], None]
) -> MongeMap:
    """Learn a map from the ``(n, 3)`` pixels of one photograph to those of the other."""
    seed_everything(settings.seed, workers=True, verbose=False)
    model = MongeMap(
        dim=3,
        cost="sqeuclidean",
        gap_weight=gap_weight,
        optimizer=partial(Adam, lr=settings.learning_rate),
        lr_scheduler=partial(CosineAnnealingLR, T_max=settings.iterations),
    )
    data = SamplesDataModule(source, target, batch_size=settings.batch_size, val_fraction=0.0, seed=settings.seed)
    trainer = Trainer(
        max_steps=settings.iterations,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[Watch(lambda pixels: tick(1))],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model


def transfer_colours(
    photographs: dict[str, NDArray[np.uint8]],
    source: str,
    target: str,
    settings: ColourSettings,
    progress: Callable[[str, int], None],
) -> ColourTransfer:
    """Learn the maps of one direction, apply them and score them."""
    generator = torch.Generator().manual_seed(settings.seed)
    x_train, x = _draw(photographs[source], settings, 1, generator)
    y_train, y, y_again = _draw(photographs[target], settings, 2, generator)
    scores, seconds, pictures, images = {}, {}, {}, {}
    for weight in settings.gap_weights:
        name = f"{source} to {target}, " + ("with the Monge gap" if weight else "without the gap")
        started = time.perf_counter()
        model = fit_map(x_train, y_train, weight, settings, lambda n, name=name: progress(name, n))  # type: ignore[misc]
        seconds[weight] = time.perf_counter() - started
        mapped = model.transport(x)
        scores[weight] = _score(x, mapped, y, settings.epsilon)
        pictures[weight] = recolour(model, photographs[source])
        images[weight] = mapped.double().numpy()
    return ColourTransfer(
        source=source,
        target=target,
        before=_score(x, x, y, settings.epsilon),
        floor=float(sinkhorn_divergence(y_again, y, epsilon=settings.epsilon)),
        scores=scores,
        seconds=seconds,
        pictures=pictures,
        images=images,
        held_out=(x.double().numpy(), y.double().numpy()),
    )
