"""What the runs, their peer's and the page have in common, without importing what only some of them have."""

from pathlib import Path
from typing import Any

__all__ = ["BASE", "GAPS", "LIBRARIES", "RUNS", "SEEDS"]

RUNS = Path("runs/monge_gap")
SEEDS = (0, 1, 2)
# The gap in the loss: its configuration in gaps/, and what a table calls it.
GAPS = {"none": "no gap", "l2": "ℓ2, λ = 2", "l22": "ℓ2², λ = 0.1", "p1.5": "p = 1.5, λ = 0.5"}
# What trained a map: how its files and rows begin, and what a table calls it.
LIBRARIES = {
    "lightning_gap": "lightning_gap",
    "flax_start": "lightning_gap, OTT-JAX's first weights",
    "ott": "OTT-JAX",
}
# The settings of the ablations, of which one is changed at a time: MongeMap's defaults.
BASE: dict[str, Any] = {
    "gap_weight": 1.0,
    "relative_gap_epsilon": 0.01,
    "relative_fitting_epsilon": 0.05,
    "batch": 256,
    "convention": "shannon",
}
