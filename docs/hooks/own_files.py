"""Files such as a reader has, for the pages that start from some: made up, or scikit-learn's, and small.

``python docs/hooks/own_files.py FOLDER`` writes those of all pages.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["OWN_FILES"]


def images(folder: Path, share: float) -> None:
    """Write scikit-learn's handwritten digits as PNG files, a folder a class, every other one for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    for number in range(int(share * len(digits))):
        part = "val" if number % 2 else "train"
        place = folder / "photos" / part / str(labels[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits[number].reshape(8, 8) * 15.9).astype(np.uint8)).save(place / f"{number:04d}.png")


def cells(folder: Path, share: float) -> None:
    """Write counts of 60 genes of control and stimulated cells: three types that answer differently, four patients."""
    import anndata
    import pandas as pd
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    rows, genes = int(share * 6000), 60
    kind, treated, patient = rng.integers(0, 3, rows), rng.integers(0, 2, rows), rng.integers(0, 4, rows)
    level = rng.normal(0.5, 1, size=genes) + rng.normal(0, 0.8, size=(3, genes))
    answer = rng.normal(0, 1.2, size=(3, genes)) * (rng.random(genes) < 0.25)
    state = rng.normal(size=(rows, 1))  # how far a cell is along its cycle, which half of the genes follow
    cycle = rng.normal(0, 0.5, size=genes) * (rng.random(genes) < 0.5)
    shift = rng.normal(0, 0.15, size=(4, genes))
    strength = 1 + 0.4 * state  # cells far along answer more
    rate = level[kind] + state * cycle + shift[patient] + treated[:, None] * strength * answer[kind]
    counts = rng.poisson(np.exp(rate) * rng.gamma(4, 0.25, size=(rows, 1)))
    normalized = np.log1p(counts / counts.sum(1, keepdims=True).clip(1) * 1e2)
    # Releases of anndata for Python 3.11 cannot write the strings of pandas 3.
    with pd.option_context("future.infer_string", False):
        obs = pd.DataFrame(
            {
                "condition": np.where(treated, "stimulated", "control"),
                "cell_type": np.array(["T cell", "B cell", "monocyte"])[kind],
                "patient": np.array(["p1", "p2", "p3", "p4"])[patient],
            },
            index=[f"cell{number}" for number in range(rows)],
        )
        var = pd.DataFrame(index=[f"gene{number}" for number in range(genes)])
        file = anndata.AnnData(counts.astype(np.float32), obs=obs, var=var)
        file.layers["lognorm"] = csr_matrix(normalized.astype(np.float32))  # sparse, as in most files
        file.write_h5ad(folder / "cells.h5ad")


def globe(folder: Path, share: float) -> None:
    """Write where birds with transmitters were in July and in January: on both sides of the date line."""
    rng = np.random.default_rng(0)
    sides = {
        "july.csv": [((58, 178), 12, 0.6), ((58, -145), 10, 0.4)],
        "january.csv": [((-38, 165), 9, 0.55), ((-20, -150), 9, 0.45)],
    }
    for name, flocks in sides.items():
        rows = []
        for (lat, lon), spread, part in flocks:
            n = int(share * part * 3000)
            north = lat + spread * rng.normal(size=n)
            east = lon + spread * rng.normal(size=n) / np.cos(np.deg2rad(lat))
            rows += list(zip(north.clip(-89, 89), (east + 180) % 360 - 180, strict=True))
        lines = [f"bird{number:04d},{lat:.4f},{lon:.4f}" for number, (lat, lon) in enumerate(rows)]
        (folder / name).write_text("\n".join(["bird,lat,lon", *lines, ""]), encoding="utf-8")


def photographs(folder: Path, share: float) -> None:
    """Write scikit-learn's two photographs, by danielbuechele and dalbera, CC BY 2.0, in a size of their own each."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    for name, source in (("holiday.jpg", "china.jpg"), ("palette.jpg", "flower.jpg")):
        picture = Image.fromarray(load_sample_image(source))
        size = [int(share * length) for length in picture.size]
        picture.resize(size).save(folder / name, quality=95)


# By the page that starts from them; a share of all rows will do for a test.
OWN_FILES: dict[str, Callable[[Path, float], None]] = {
    "start_images": images,
    "start_cells": cells,
    "start_globe": globe,
    "start_colours": photographs,
}

if __name__ == "__main__":
    for make in OWN_FILES.values():
        make(Path(sys.argv[1]), 1.0)
