"""A fit of one of several maps, without files and output."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.samples.datamodule import SamplesDataModule
from lightning_gap.trainer.terminal import quiet

__all__ = ["fitted", "plain_trainer"]


def plain_trainer(max_steps: int, **options: Any) -> Trainer:
    """Return a trainer of one device that makes so many updates, and writes, shows and validates nothing."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silent: dict[str, Any] = dict.fromkeys(shown, False)
    silent |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    return Trainer(devices=1, max_steps=max_steps, max_epochs=-1, **silent, **options)


def fitted(
    make_model: Callable[[], MongeMap],
    data: SamplesDataModule,
    make_trainer: Callable[[], Trainer] | None,
    max_steps: int,
) -> MongeMap:
    """Return a new map that was fitted to some data, on the CPU's side of its trainer."""
    model = make_model()
    if not isinstance(model, MongeMap):
        raise TypeError(f"make_model must return a new MongeMap, got {type(model).__name__}")
    if model.map is not None and bool(model.epsilons.started):
        raise ValueError("make_model returned a map that was fitted before: make a new one at each call")
    if make_trainer is None:
        with quiet():
            plain_trainer(max_steps).fit(model, data)
    else:
        make_trainer().fit(model, data)
    model.trainer = None  # which would keep the samples alive
    return model.eval()
