"""Distances between populations of cells, against pertpy's: all metrics, and the tables of groups.

Needs pertpy (``benchmarks/requirements.txt``). With ``--data`` also B cells of Kang et al. 2018, if the folder has
``kang_ifnb.npz``. ``--golden`` prints the values that the tests hold.

    python -m benchmarks.science.pertpy_distances --data FOLDER
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gap.monge.scores import DISTANCES, perturbation_distance

Array = NDArray[np.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "mmd rbf": {"kernel": "rbf", "gamma": 0.1},
    "mmd poly": {"kernel": "poly", "gamma": 0.5, "degree": 2},
}


def made(kind: str, n: int, d: int, phase: float) -> Array:
    """Return cells by a formula, the same everywhere: of an embedding, or positive whole numbers."""
    i, k = np.meshgrid(np.arange(n), np.arange(d), indexing="ij")
    wave = np.sin(1.7 * i + 0.9 * k * (1 + 0.1 * i) + phase) + 0.3 * np.cos(0.37 * i * (k + 1)) + 0.2 * k * (phase > 1)
    return wave if kind == "embedding" else np.floor(4 * (1 + wave) ** 2) + k


def made_sets() -> dict[str, tuple[Array, Array]]:
    """Return two sets of each kind."""
    return {kind: (made(kind, 40, 6, 0.0), made(kind, 30, 6, 1.5)) for kind in ("embedding", "positive")}


def _real(folder: Path) -> dict[str, tuple[Array, Array]]:
    path = folder / "kang_ifnb.npz"
    if not path.is_file():
        return {}
    with np.load(path) as data:
        treated, chosen = data["treated"].astype(bool), data["cell_type"] == 0
        genes = data["logcounts"].astype(np.float64)
        return {"B cells": (genes[chosen & ~treated][:300], genes[chosen & treated][:250])}


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    start = time.perf_counter()
    value = float(call())
    return value, 1e3 * (time.perf_counter() - start)


def _converged(peer: Any, x: Array, y: Array) -> float:
    """Return pertpy's value of ``wasserstein`` by its own code, in double precision and at 1e-9."""
    import jax
    from ott.solvers.linear.sinkhorn import Sinkhorn

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        distance = peer.tl.Distance("wasserstein")
        distance.metric_fct.solver = jax.jit(Sinkhorn(threshold=1e-9, max_iterations=20_000))
        return float(distance(x, y))


def compare(peer: Any, sets: dict[str, tuple[Array, Array]], golden: bool) -> None:
    """Print all values and their relative differences, or the values alone."""
    print("set | metric | pertpy | this package | relative difference | ms of both")
    for title, (x, y) in sets.items():
        for name in [*DISTANCES, *OPTIONS]:
            metric, options = name.split()[0], OPTIONS.get(name, {})
            distance = peer.tl.Distance(metric)
            theirs, ms = _timed(partial(distance, x, y, **options))
            if golden:
                print(f"{title} | {name} | {theirs!r}")
                continue
            ours, own_ms = _timed(partial(perturbation_distance, x, y, metric, **options))
            off = abs(ours - theirs) / max(abs(theirs), 1e-12)
            print(f"{title} | {name} | {theirs:.10g} | {ours:.10g} | {off:.1e} | {ms:.1f}, {own_ms:.1f}")
        theirs, ours = _converged(peer, x, y), perturbation_distance(x, y, "wasserstein", tolerance=1e-8)
        print(f"{title} | wasserstein, converged | {theirs!r} | {ours!r} | {abs(ours - theirs) / theirs:.1e} |")


def compare_tables(peer: Any, x: Array, y: Array) -> None:
    """Print how far tables of groups are from pertpy's."""
    import anndata
    import pandas as pd

    from lightning_gap.monge.cells import distances_to, pairwise_distances

    groups = [f"g{i % 2 + 1}" for i in range(len(x))] + ["control"] * len(y)
    obs = pd.DataFrame({"group": groups}, index=[f"c{i}" for i in range(len(groups))])
    values = np.concatenate([x, y])
    cells = anndata.AnnData(values, obs=obs, obsm={"X_pca": values})
    for metric in ("edistance", "mse", "t_test", "mahalanobis"):
        distance = peer.tl.Distance(metric, obsm_key="X_pca")
        theirs = distance.pairwise(cells, "group", groups=["control", "g1", "g2"], show_progressbar=False, n_jobs=1)
        ours = pairwise_distances(cells, "group", metric=metric, obsm="X_pca")
        off = np.abs(ours.to_numpy() - theirs.loc[ours.index, ours.columns].to_numpy()).max()
        one = distance.onesided_distances(cells, "group", selected_group="control", show_progressbar=False, n_jobs=1)
        sides = distances_to(cells, "group", "control", metrics=metric, obsm="X_pca")[metric]
        apart = np.abs(sides - one[sides.index]).max()
        print(f"{metric} | pairwise, largest difference {off:.1e} | to the controls {apart:.1e}")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with kang_ifnb.npz")
    parser.add_argument("--golden", action="store_true", help="print pertpy's values alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import pertpy

    print(f"pertpy {pertpy.__version__}")
    sets = made_sets()
    compare(pertpy, sets | ({} if options.data is None else _real(options.data)), options.golden)
    compare_tables(pertpy, *sets["embedding"])


if __name__ == "__main__":
    main()
