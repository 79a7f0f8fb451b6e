"""Write the data of the examples to the folder `data`: small, made from a seed, in the formats that people have.

python examples/make_data.py
"""

from pathlib import Path

import numpy as np
import pandas as pd


def monge_map(folder: Path, rng: np.random.Generator) -> None:
    """One population before and after: ten features that move, each by its own amount."""
    before = rng.normal(size=(2000, 10))
    after = rng.normal(size=(2000, 10)) * np.linspace(0.5, 1.5, 10) + np.linspace(-2, 2, 10)
    np.save(folder / "before.npy", before.astype(np.float32))
    np.save(folder / "after.npy", after.astype(np.float32))


def conditional(folder: Path, rng: np.random.Generator) -> None:
    """Cells of controls, and of three drugs: each drug moves them its own way."""
    shifts = {"aspirin": (1.0, 0.0), "caffeine": (0.0, 1.5), "placebo": (0.0, 0.0)}
    cells = [("control", rng.normal(size=(900, 2)))]
    cells += [(drug, rng.normal(size=(300, 2)) + shift) for drug, shift in shifts.items()]
    frame = pd.DataFrame(np.concatenate([samples for _, samples in cells]), columns=["gene_a", "gene_b"])
    frame.insert(0, "cell", [f"cell_{i:04d}" for i in range(len(frame))])
    frame["arm"] = np.repeat(["control", "treated"], [900, 900])
    frame["drug"] = np.concatenate([np.resize(list(shifts), 900), np.repeat(list(shifts), 300)])
    frame.to_csv(folder / "cells.csv", index=False)


def sphere(folder: Path, rng: np.random.Generator) -> None:
    """Directions around the north pole, and around a point on the equator."""
    for name, pole in (("north", (0, 0, 4)), ("equator", (4, 0, 0))):
        points = rng.normal(size=(1500, 3)) + pole
        np.save(folder / f"{name}.npy", (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32))


def main() -> None:
    """Write all of them."""
    folder = Path("data")
    folder.mkdir(exist_ok=True)
    for make in (monge_map, conditional, sphere):
        make(folder, np.random.default_rng(0))


if __name__ == "__main__":
    main()
