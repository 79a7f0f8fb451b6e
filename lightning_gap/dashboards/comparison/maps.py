"""The section of the transport maps."""

from collections.abc import Sequence
from typing import Any

from lightning_gap.dashboards.comparison.compared import MOST_COLUMNS, Compared, as_float, count
from lightning_gap.dashboards.comparison.names import MONGE, better, short
from lightning_gap.dashboards.report import Gallery, Legend, Section
from lightning_gap.dashboards.table import ResultTable

__all__ = ["maps_section"]

_ORDER = (
    "sinkhorn_divergence", "monge_gap", "energy_distance", "wasserstein_1", "unexplained_variance",
    "displacement_cosine", "displacement", "loss",
)  # fmt: skip


def maps_section(compared: Compared) -> Section | None:
    """Return the section, if any run logged something of a map."""
    compared = compared.where(lambda run: any(key.startswith(MONGE) for key in run.metrics))
    if not compared.runs:
        return None
    known = {key for run in compared.runs for key in run.metrics if key.startswith(MONGE)}
    stages = [stage for stage in ("test", "val", "train") if any(short(key).startswith(stage) for key in known)]
    ordered = [f"{MONGE}{stage}_{name}" for stage in stages for name in _ORDER]
    present = [key for key in ordered if key in known]
    # A loss of another weight, and a gap of another cost, are other quantities.
    same = {name: len(set(compared.given(name))) == 1 for name in ("cost", "gap_weight")}
    unmarked = {"displacement": True, "loss": not all(same.values()), "monge_gap": not same["cost"]}
    best = {key: None if unmarked.get(short(key).partition("_")[2]) else better(key) for key in present}
    held_out = [key for key in present if "/train_" not in key] or present
    scores = {short(key).replace("_", " "): (compared.last(key), best[key]) for key in held_out[:MOST_COLUMNS]}
    columns: dict[str, Sequence[Any] | tuple[Sequence[Any], Any]] = {
        "cost": [None if cost is None else str(cost) for cost in compared.given("cost")],
        **scores,
        "λ": [as_float(weight) for weight in compared.given("gap_weight")],
    }
    caption = (
        "The last values. The divergence tells how far the images are from the target, the gap what the map pays over "
        "an optimal one for its cost; neither a gap of another cost nor a loss of another weight λ is marked."
    )
    maps = compared.pictures([f"{MONGE}map"])
    blocks: list[ResultTable | Gallery | Legend] = [compared.table("Maps", columns, caption)]
    blocks += compared.with_legend(compared.curves(held_out[:4]))
    if maps:
        blocks.append(Gallery(maps, 1 if len(maps) == 1 else 2))
    return Section(
        "Transport maps",
        f"{count(len(compared.runs), 'map')}: fit, Monge gap, and where samples go.",
        blocks,
        "Uscidda, Cuturi 2023 · The Monge gap",
    )
