"""The large-batch half of the demo: table 1 of Hoffer, Hubara, Soudry 2017 in small, on real images.

The F1 network and its regime are the paper's: SGD with momentum 0.9, weight decay 1e-4, learning rate 0.1, divided by
10 after 20 %, 40 % and 60 % of the epochs, gradients clipped to norm 5 in every run. Only the number of epochs is
smaller. Nothing is tuned: the test part is only looked at.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from lightning_gap import GhostBatchNorm, LargeBatchRegime, UltraSlowDiffusion
from lightning_gap.demo.datasets import ImageSplit
from lightning_gap.demo.f1 import F1
from lightning_gap.diffusion import DiffusionFit, constant_lr_segments, fit_diffusion
from lightning_gap.regime import RegimePlan

__all__ = ["RECIPES", "Classifier", "LargeBatchSettings", "Recipe", "TrainingRun", "Watch", "train_all"]


class Classifier(LightningModule):
    """F1 under the paper's regime: the learning rate falls at 20 %, 40 % and 60 % of the small-batch epochs."""

    def __init__(self, epochs: int, learning_rate: float = 0.1, width: int = 512) -> None:
        super().__init__()
        self.epochs, self.learning_rate = epochs, learning_rate
        self.network = F1(width=width)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(n, 10)`` logits of ``(n, 784)`` images."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.log("loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD and its three drops of the learning rate, counted in epochs."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=1e-4)
        drops = [round(self.epochs * share) for share in (0.2, 0.4, 0.6)]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)}


@dataclass(frozen=True)
class LargeBatchSettings:
    """The configuration of the four runs, fixed before any of them.

    Args:
        epochs: Epochs of the small-batch regime.
        small_batch: The batch the regime was made for, and the ghost batch.
        large_batch: The batch of the three other runs.
        seeds: One run a recipe and seed.
        clip_norm: Bound of the gradient's norm, in all runs.
        width: Units a layer of the network.
    """

    epochs: int = 10
    small_batch: int = 128
    large_batch: int = 1024
    seeds: Sequence[int] = (0, 1)
    clip_norm: float = 5.0
    width: int = 512


@dataclass(frozen=True)
class Recipe:
    """One line of the table; ``callbacks`` makes what it adds to the trainer."""

    name: str
    detail: str
    large: bool
    callbacks: Callable[[LargeBatchSettings], list[Callback]]


RECIPES = (
    Recipe("Small batch", "the reference", False, lambda s: []),
    Recipe("Large batch", "same epochs, same learning rate", True, lambda s: []),
    Recipe(
        "+ regime",
        "LargeBatchRegime: same updates, √ learning rate",
        True,
        lambda s: [LargeBatchRegime(reference_batch_size=s.small_batch)],
    ),
    Recipe(
        "+ regime + Ghost BN",
        "LargeBatchRegime and GhostBatchNorm",
        True,
        lambda s: [LargeBatchRegime(reference_batch_size=s.small_batch), GhostBatchNorm(s.small_batch)],
    ),
)


@dataclass(frozen=True)
class TrainingRun:
    """What one run came to; losses and accuracies (per cent) are the last weights' in evaluation mode."""

    recipe: str
    seed: int
    test_accuracy: float
    train_accuracy: float
    train_loss: float
    updates: int  # optimizer steps
    epochs: int
    seconds: float  # of the fit
    curve: list[tuple[int, float]]  # (updates, test accuracy in per cent) along the way
    distances: list[tuple[int, float]]  # (updates, ‖w_t − w_0‖) along the way
    diffusion: DiffusionFit | None  # the laws at the first learning rate; None if the run was too short
    plan: RegimePlan | None  # what the regime callback changed


class Watch(Callback):
    """Tell the progress bar how many images have passed, and keep the accuracy curve."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance
        self.curve: list[tuple[int, float]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        """Advance the bar by one batch."""
        self.advance(len(batch[0]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the test accuracy."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.curve.append((trainer.global_step, 100 * float(trainer.callback_metrics["accuracy"])))


def images_to_pass(settings: LargeBatchSettings, images: int) -> int:
    """Return how many images pass through the network in all runs together, for a progress bar."""
    stretch = settings.large_batch / settings.small_batch
    return round(len(settings.seeds) * settings.epochs * images * (2 + 2 * stretch))


def train(
    recipe: Recipe, seed: int, data: ImageSplit, settings: LargeBatchSettings, advance: Callable[[int], None]
) -> TrainingRun:
    """Train one recipe with one seed, which sets the weights and the order of the images."""
    seed_everything(seed, workers=True, verbose=False)
    batch_size = settings.large_batch if recipe.large else settings.small_batch
    added = recipe.callbacks(settings)
    regime = next((callback for callback in added if isinstance(callback, LargeBatchRegime)), None)
    watch, diffusion = Watch(advance), UltraSlowDiffusion(points_per_decade=20)
    trainer = Trainer(
        max_epochs=settings.epochs,
        callbacks=[*added, diffusion, watch],
        gradient_clip_val=settings.clip_norm,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = Classifier(settings.epochs, width=settings.width)
    test, training = data.loaders_in_order()
    started = time.perf_counter()
    trainer.fit(model, data.train_loader(batch_size), test)
    seconds = time.perf_counter() - started
    updates, epochs = trainer.global_step, trainer.current_epoch
    on_test, on_training = (trainer.validate(model, loader, verbose=False)[0] for loader in (test, training))
    distances, fit = _diffusion(diffusion)
    return TrainingRun(
        recipe=recipe.name,
        seed=seed,
        test_accuracy=100 * on_test["accuracy"],
        train_accuracy=100 * on_training["accuracy"],
        train_loss=on_training["loss"],
        updates=updates,
        epochs=epochs,
        seconds=seconds,
        curve=watch.curve,
        distances=distances,
        diffusion=fit,
        plan=regime.plan if regime else None,
    )


def _diffusion(callback: UltraSlowDiffusion) -> tuple[list[tuple[int, float]], DiffusionFit | None]:
    """Return the whole trace, and the laws fitted to its stretch at the first learning rate (the paper's figure 2)."""
    trace = callback.trace
    first = constant_lr_segments(trace["learning_rate"])[0]
    try:
        # The demo's first stretch is short: under two decades, which the callback itself would not fit.
        fit = fit_diffusion(trace["updates"][first], trace["distance"][first], minimum_decades=0.5)
    except ValueError:
        fit = None
    return [(round(t), d) for t, d in zip(trace["updates"], trace["distance"], strict=True)], fit


def train_all(
    data: ImageSplit, settings: LargeBatchSettings, progress: Callable[[str, int], None]
) -> dict[str, list[TrainingRun]]:
    """Train every recipe with every seed and return the runs by recipe."""
    results: dict[str, list[TrainingRun]] = {recipe.name: [] for recipe in RECIPES}
    for seed in settings.seeds:
        for recipe in RECIPES:
            name = f"{recipe.name}, seed {seed}"
            results[recipe.name].append(train(recipe, seed, data, settings, lambda n, name=name: progress(name, n)))  # type: ignore[misc]
    return results
