"""The section of the distances from the first weights."""

from collections.abc import Sequence
from typing import Any

from lightning_gap.dashboards import figures
from lightning_gap.dashboards.comparison.compared import Compared, count, curve
from lightning_gap.dashboards.comparison.names import DIFFUSION
from lightning_gap.dashboards.report import Figure, Gallery, Section

__all__ = ["diffusion_section"]


def diffusion_section(compared: Compared) -> Section | None:
    """Return the section, if any run logged its distance."""
    key = f"{DIFFUSION}distance"
    compared = compared.where(lambda run: key in run.metrics)
    if not compared.runs:
        return None

    def fitted(name: str) -> list[float | None]:
        return compared.last(DIFFUSION + name)

    drawn = ("log_intercept", "log_slope", "first_update", "last_update")
    laws = [None if None in law else law for law in zip(*map(fitted, drawn), strict=True)]
    lines = [curve(run, key) for run in compared.runs]
    overlay = figures.overlay(
        lines, compared.styles, xlabel="updates t", ylabel="‖wₜ − w₀‖", logx=True, wide=True,
        laws=laws,
    )  # fmt: skip
    walk = Figure(
        figures.as_svg(overlay),
        "The distance from the initial weights against the logarithm of the update. Dashed: the law a + b·log t, "
        "over the updates it was fitted to. The paper's claim is that runs with one slope explore alike.",
        "Distance from the initial weights against log updates: "
        + ", ".join(f"{line.label} ends at {line.y[-1]:.4g}" for line in lines if len(line.y)),
        "Ultra-slow diffusion",
    )
    more = compared.curves([f"{DIFFUSION}relative_distance", f"{DIFFUSION}cosine"], logx=True)
    columns: dict[str, Sequence[Any]] = {
        "Last distance": compared.last(key),
        "Slope b": fitted("log_slope"),
        "R² of a + b·log t": fitted("log_r2"),
        "Exponent p": fitted("power_exponent"),
        "R² of c·tᵖ": fitted("power_r2"),
        "Weight of the logarithm": fitted("log_weight"),
        "α": fitted("alpha"),
    }
    caption = (
        "Both laws over the longest stretch of constant learning rate, as UltraSlowDiffusion fitted them at the end of "
        "each run; nothing where a run spans under two decades of updates or was cut off. The weight is Akaike's."
    )
    return Section(
        "Distance from the start",
        f"How far the weights of {count(len(compared.runs), 'run')} travelled, and by which law.",
        [compared.legend(), Gallery([walk], 1), *([Gallery(more, 2)] if more else []),
         compared.table("Laws of diffusion", columns, caption)],
        "Hoffer, Hubara, Soudry 2017 · section 3",
    )  # fmt: skip
