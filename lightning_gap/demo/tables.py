"""The tables of the demo, for the terminal and for the report."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lightning_gap.dashboards import Column, ResultTable, Row
from lightning_gap.demo.colour_transfer import ColourTransfer
from lightning_gap.demo.large_batch import RECIPES, LargeBatchSettings, TrainingRun

__all__ = ["THINGS", "Runs", "accuracy_table", "colour_table", "diffusion_table", "map_name"]

# What the photographs show.
THINGS = {"china": "the pagoda", "flower": "the flower"}

Runs = Mapping[str, Sequence[TrainingRun]]


def accuracy_table(data: str, runs: Runs, settings: LargeBatchSettings) -> ResultTable:
    """Return the table of the four recipes."""
    columns = [
        Column("Test accuracy", 2, "max", "%"),
        Column("Train loss", 4),
        Column("Updates", 0),
        Column("Epochs", 0),
        Column("Seconds", 1),
    ]
    rows = [
        Row(
            recipe.name,
            [
                [run.test_accuracy for run in runs[recipe.name]],
                [run.train_loss for run in runs[recipe.name]],
                runs[recipe.name][0].updates,
                runs[recipe.name][0].epochs,
                fmean(run.seconds for run in runs[recipe.name]),
            ],
            detail=f"batch {settings.large_batch if recipe.large else settings.small_batch}; {recipe.detail}",
        )
        for recipe in RECIPES
    ]
    seeds = "1 seed" if len(settings.seeds) == 1 else f"{len(settings.seeds)} seeds"
    caption = (
        f"Accuracy on the test images and cross-entropy on the training images, with the last weights: mean ± sample "
        f"standard deviation of {seeds}. The configuration is the paper's with fewer epochs, and "
        "was fixed before the first run. A longer run sees more images: equal updates are not equal work, as the "
        "seconds show."
    )
    return ResultTable(data, "Run", columns, rows, caption)


def diffusion_table(runs: Runs) -> ResultTable:
    """Return the table of the laws of diffusion at the first learning rate."""
    columns = [
        Column("Slope b", 2),
        Column("R² of a + b·log t", 3),
        Column("R² of c·tᵖ", 3),
        Column("Updates fitted", 0),
    ]
    rows = []
    for recipe in RECIPES:
        fits = [run.diffusion for run in runs[recipe.name] if run.diffusion is not None]
        values: list[Any] = (
            [
                [fit.log_slope for fit in fits],
                [fit.log_r2 for fit in fits],
                [fit.power_r2 for fit in fits],
                fits[0].last_update,
            ]
            if fits
            else ["too few updates", "", "", ""]
        )
        rows.append(Row(recipe.name, values))
    every = [run.diffusion for several in runs.values() for run in several if run.diffusion is not None]
    nearer = sum(fit.preferred == "log" for fit in every)
    caption = (
        "Least squares over the updates at the first learning rate, for ‖wₜ − w₀‖ of all weights; R² of both laws is "
        f"in the same units. The logarithm is the nearer law in {nearer} of {len(every)} runs. Under two decades of "
        "updates the two are hard to tell apart."
    )
    return ResultTable("Laws of diffusion", "Run", columns, rows, caption)


def map_name(weight: float) -> str:
    """Return what a map is called by the weight of its gap."""
    return f"Map with the Monge gap, λ = {weight:g}" if weight else "Map without the gap"


def colour_table(transfer: ColourTransfer, epsilon: float, held_out: int) -> ResultTable:
    """Return the table of the maps of one direction."""
    columns = [
        Column("Sinkhorn divergence", 4, "min"),
        Column("Monge gap", 4, "min"),
        Column("Displacement", 3, "min"),
        Column("Seconds", 1),
    ]
    # Not marked: the rows that are no maps to the target.
    plain = [f"{transfer.before.divergence:.4f}", f"{transfer.before.gap:.4f}", f"{transfer.before.displacement:.3f}"]
    rows = [Row("Untouched colours", [*plain, "–"])]
    rows += [
        Row(map_name(weight), [score.divergence, score.gap, score.displacement, transfer.seconds[weight]])
        for weight, score in transfer.scores.items()
    ]
    rows.append(Row(f"A second sample of {THINGS[transfer.target]}", [f"{transfer.floor:.4f}", "–", "–", "–"]))
    caption = (
        f"On {held_out:,} held-out pixels of each photograph, RGB in [0, 1], cost |x − y|², ε = {epsilon:g}. Sinkhorn "
        "divergence: how far the new colours are from the target's; the last row is what sampling alone leaves. Monge "
        "gap: what the map pays over the best pairing of the same colours (debiased convention: 0 for an optimal map). "
        "Displacement: the mean of ‖T(x) − x‖."
    )
    return ResultTable(f"{transfer.source}.jpg → colours of {transfer.target}.jpg", "Colours", columns, rows, caption)
