"""The section of the regimes: each run beside its reference run."""

from collections.abc import Sequence
from typing import Any

from lightning_gap.dashboards import figures
from lightning_gap.dashboards.comparison.compared import Compared, as_float, count
from lightning_gap.dashboards.comparison.names import HELD_OUT, REGIME, better, result_metrics, short
from lightning_gap.dashboards.comparison.results import batch
from lightning_gap.dashboards.report import Figure, Section

__all__ = ["regime_section"]


def regime_section(compared: Compared) -> Section | None:
    """Return the section, if any run logged something of a regime."""
    held_out = next((key for key in result_metrics(compared.runs) if HELD_OUT.search(key) and better(key)), None)
    compared = compared.where(lambda run: any(key.startswith(REGIME) for key in (*run.metrics, *run.config)))
    if not compared.runs:
        return None

    def whole(name: str) -> list[int | None]:
        return [None if x is None else int(x) for x in map(as_float, compared.given(REGIME + name))]

    columns: dict[str, Sequence[Any]] = {
        "Reference batch": compared.given(f"{REGIME}reference_batch_size"),
        "Batch": compared.given(f"{REGIME}batch_size"),
        "Rule": compared.given(f"{REGIME}lr_rule"),
        "Rate\u00a0×": [None if x is None else float(x) for x in compared.given(f"{REGIME}lr_factor")],
        "Updates of the reference": whole("reference_updates"),
        "Updates": whole("updates"),
        "Epochs of the reference": whole("reference_epochs"),
        "Epochs": whole("epochs"),
        "Critical batch": compared.last(f"{REGIME}critical_batch_size"),
    }
    caption = (
        "What LargeBatchRegime made of each reference run. The critical batch is what GradientNoiseScale measured: "
        "beyond it, a larger batch saves few updates."
    )
    gallery = _gap_figure(compared, held_out)
    gallery += compared.curves([f"{REGIME}learning_rate", f"{REGIME}clipped_fraction"])
    gallery += compared.curves([f"{REGIME}noise_scale"], logy=True)
    return Section(
        "Large batches",
        f"The regime of {count(len(compared.runs), 'run')}: batch, learning rate and length beside the reference "
        "run's.",
        [compared.table("Regimes", columns, caption), *compared.with_legend(gallery)],
        "Hoffer, Hubara, Soudry 2017 · Train longer, generalize better",
    )


def _gap_figure(compared: Compared, metric: str | None) -> list[Figure]:
    """Return the last value of a metric by batch size, if there are several sizes."""
    if metric is None:
        return []
    found = [(run.name, batch(run), run.last(metric)) for run in compared.runs]
    points = {name: (size, value) for name, size, value in found if size is not None and value is not None}
    if len({size for size, _ in points.values()}) < 2:
        return []
    figure = figures.scatter(
        list(points.values()),
        [compared.numbers[name] for name in points],
        xlabel="batch (samples per update)",
        ylabel=short(metric),
    )
    return [
        Figure(
            figures.as_svg(figure),
            "What the last weights of each run reach, against the samples of one update.",
            f"{metric} by batch size",
            "The generalization gap by batch size",
        )
    ]
