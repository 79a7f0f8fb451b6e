"""OTT-JAX's and POT's map estimators on pairs whose optimal map is known, in an environment of their own.

    PEER/bin/python -m benchmarks.science.peers.maps w2 --data FOLDER [--solvers NAME ...] [--dims 2 8] [--seeds 0 1 2]
    PEER/bin/python -m benchmarks.science.peers.maps rays --data FOLDER
    PEER/bin/python -m benchmarks.science.peers.maps powers --data FOLDER

PEER is an environment of ``benchmarks/requirements.txt``. ``w2``: the Wasserstein-2 benchmark's ``w2_mix3to10_D*.npz``
(see ``transport_maps.py``). ``rays``: the Euclidean cost, ``rays_D*.npz``, and ``powers``: the cost
|x - y|^1.5, ``powers_D*.npz``, which ``pairs.py`` writes.

A row is appended to ``--out`` for each solver, dimension, setting and, where it has randomness, seed; what is there
already is not run again. Everything has one thread.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import ot
from ott.geometry import pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn
from ott.tools import progot

from benchmarks.logs import RESULTS, append, read
from benchmarks.science.peers.training import (
    COSTS,
    Array,
    Map,
    Pair,
    enot,
    gap_estimator,
    trained_dual,
    w2_icnn,
    w2_mlp,
)

__all__ = ["main"]

FILES = {"w2": "w2_mix3to10_D{}.npz", "rays": "rays_D{}.npz", "powers": "powers_D{}.npz"}
COSTS_OF = {"w2": "sqeuclidean", "rays": "euclidean", "powers": "pnorm(p=1.5)"}


def timed(pair: Pair, n: int, fit: Callable[[Array, Array], tuple[Map, dict[str, Any]]]) -> dict[str, Any]:
    """Fit to the first n samples of each measure, and return the row without names."""
    cpu, wall = time.process_time(), time.perf_counter()
    mapping, found = fit(pair.x[:n], pair.y[:n])
    mapped = mapping(pair.test)
    seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    return pair.score(mapped) | {name: round(value, 2) for name, value in seconds.items()} | found | {"samples": n}


def entropic(pair: Pair, n: int, share: float) -> dict[str, Any]:
    """Return the row of OTT-JAX's entropic map, at a share of its default epsilon."""

    def fit(x: Array, y: Array) -> tuple[Map, dict[str, Any]]:
        geometry = cloud(pair, x, y, None)
        epsilon = share * float(geometry.epsilon)
        # At this size its batch_size= would save memory; it needs a name that jax 0.10 no longer has.
        problem = linear_problem.LinearProblem(cloud(pair, x, y, epsilon))
        out = jax.jit(lambda problem: sinkhorn.Sinkhorn()(problem))(problem)
        found = {"epsilon": epsilon, "iterations": int(out.n_iters), "converged": bool(out.converged)}
        return in_parts(jax.jit(out.to_dual_potentials().transport)), found

    return timed(pair, n, fit)


def progressive(pair: Pair, n: int, moved: bool) -> dict[str, Any]:
    """Return the row of OTT-JAX's ProgOT: four steps, its default epsilons.

    Args:
        pair: Gives the samples.
        n: How many of them.
        moved: Every step starts from the points where the last one left them, as in the paper and in the map of new
            points; the solver of 0.6.0 mixes the steps' images with the original points.
    """

    def fit(x: Array, y: Array) -> tuple[Map, dict[str, Any]]:
        alphas = progot.get_alpha_schedule("exp", num_steps=4)
        if not moved:
            out = progot.ProgOT(alphas)(linear_problem.LinearProblem(cloud(pair, x, y, None)))
            return in_parts(jax.jit(lambda x: out.transport(x)[1])), {"iterations": [int(i) for i in out.num_iters]}
        current, maps, iterations = jnp.asarray(x), [], []
        solve = jax.jit(
            lambda x, y, epsilon: sinkhorn.Sinkhorn()(linear_problem.LinearProblem(cloud(pair, x, y, epsilon)))
        )
        for alpha in alphas:
            out = solve(current, jnp.asarray(y), float(cloud(pair, current, y, None).epsilon))
            maps.append((float(alpha), in_parts(jax.jit(out.to_dual_potentials().transport))))
            iterations.append(int(out.n_iters))
            current = (1 - alpha) * current + alpha * maps[-1][1](np.asarray(current))

        def mapping(x: Array) -> Array:
            image = x
            for alpha, step in maps:
                image = step(x)
                x = (1 - alpha) * x + alpha * image
            return image

        return mapping, {"iterations": iterations}

    return timed(pair, n, fit)


def cloud(pair: Pair, x: Array, y: Array, epsilon: float | None) -> pointcloud.PointCloud:
    """Return the samples with the pair's cost."""
    cost = COSTS[pair.cost]
    # Refuses at once, and not behind the solver, a cost without a map from potentials.
    cost.twist_operator(jnp.ones(2), jnp.ones(2), False)
    return pointcloud.PointCloud(jnp.asarray(x), jnp.asarray(y), cost_fn=cost, epsilon=epsilon)


def in_parts(mapping: Callable[[Any], Any], size: int = 512) -> Map:
    """Return a map that takes some points at a time, for memory."""
    return lambda x: np.concatenate([np.asarray(mapping(jnp.asarray(x[i : i + size]))) for i in range(0, len(x), size)])


def pot(pair: Pair, n: int, estimator: Any, median_sigma: bool = False) -> dict[str, Any]:
    """Return the row of one of POT's estimators."""
    if median_sigma:
        few = pair.x[:500].astype(np.float64)
        estimator.sigma = float(np.sqrt(np.median(ot.dist(few, few)[np.triu_indices(len(few), 1)])))

    def fit(x: Array, y: Array) -> tuple[Map, dict[str, Any]]:
        estimator.fit(Xs=x.astype(np.float64), Xt=y.astype(np.float64))
        sigma = {"sigma": estimator.sigma} if hasattr(estimator, "sigma") else {}
        # All at once: its out-of-sample map normalizes the plan anew for each batch.
        size = {} if isinstance(estimator, ot.da.MappingTransport) else {"batch_size": 4096}
        return lambda x: estimator.transform(Xs=x.astype(np.float64), **size), sigma

    return timed(pair, n, fit)


def runs(kind: str, budget: float) -> dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]], bool]]:
    """Return the solvers: configuration, what runs them on a pair and a seed, and whether they have seeds."""
    metric = "euclidean" if kind == "rays" else "sqeuclidean"  # POT's estimators have no powers
    made: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]], bool]] = {
        "identity": ({}, lambda p, s: timed(p, 0, lambda x, y: (lambda x: x, {})), False),
        "mean shift": ({}, lambda p, s: pot(p, len(p.x), Shift()), False),
        "POT LinearTransport": ({"reg": 1e-8}, lambda p, s: pot(p, len(p.x), ot.da.LinearTransport()), False),
    }

    def add(name: str, config: dict[str, Any], run: Callable[[Pair, int], dict[str, Any]], seeds: bool = False) -> None:
        made[name] = config, run, seeds

    if kind == "w2":
        for make, title, lr, batch, config in (
            (w2_icnn, "OTT W2NeuralDual, ICNN", 1e-3, 256, {"f": "ICNN 64x4, Gaussian start", "g": "map 64x4"}),
            (w2_mlp, "OTT W2NeuralDual, MLP", 5e-3, 256, {"f, g": "potentials 64x4"}),
            (
                enot,
                "OTT ExpectileNeuralDual",
                5e-4,
                1024,
                {"f, g": "MLP 128x4", "expectile": 0.98, "coefficient": 0.25},
            ),
        ):

            def dual(p: Pair, s: int, make: Any = make, lr: float = lr, batch: int = batch) -> dict[str, Any]:
                return trained_dual(p, s, budget, make, lr, batch)

            add(title, config | {"lr": lr, "batch": batch}, dual, seeds=True)
    for weight, batch in ((2.0, 256),) if kind != "w2" else ((1.0, 256), (10.0, 512)):
        config = {"weight": weight, "hidden": [128] * 3, "batch": batch, "lr": 5e-3, "epsilons": "the tutorial's"}

        def gap(p: Pair, s: int, weight: float = weight, batch: int = batch) -> dict[str, Any]:
            return gap_estimator(p, s, budget, weight, [128] * 3, batch, 5e-3)

        name = f"OTT MongeGapEstimator, λ = {weight:g}" if weight < 10 else f"OTT MongeGapEstimator (λ = {weight:g})"
        add(name, config, gap, seeds=True)
    for share, n in ((1.0, 4096), (0.2, 4096), (0.05, 4096), (1.0, 16384)):
        add(f"OTT entropic map, ε x {share:g}, n = {n}", {"epsilon": f"{share:g} x default"},
            lambda p, s, share=share, n=n: entropic(p, n, share))  # fmt: skip
    for moved in (False, True):
        name = f"OTT ProgOT{', from moved points' if moved else ''}, n = 4096"
        add(name, {"steps": 4, "alphas": "exp", "epsilon": "default"},
            lambda p, s, moved=moved: progressive(p, 4096, moved))  # fmt: skip
    for reg in (1.0, 0.1):
        add(f"POT SinkhornTransport, reg_e = {reg:g}, n = 2048", {"reg_e": reg, "metric": metric},
            lambda p, s, reg=reg: pot(
                p, 2048, ot.da.SinkhornTransport(reg_e=reg, metric=metric, log=True)
            ))  # fmt: skip
    add("POT EMDTransport, n = 4096", {"metric": metric},
        lambda p, s: pot(p, 4096, ot.da.EMDTransport(metric=metric, max_iter=10**7)))  # fmt: skip
    if kind == "w2":
        for kernel, n, wide in (("linear", 1024, False), ("gaussian", 1024, False), ("gaussian", 1024, True)):
            name = f"POT MappingTransport, {kernel}{', median σ' if wide else ''}, n = {n}"
            add(name, {"kernel": kernel, "mu": 1, "eta": 1e-3, "bias": True, "max_iter": 20},
                lambda p, s, kernel=kernel, n=n, wide=wide: pot(
                    p, n, ot.da.MappingTransport(kernel=kernel, bias=True, max_iter=20), wide
                ))  # fmt: skip
    return made


class Shift:
    """The displacement of the means, for all points, in the form of POT's estimators."""

    def fit(self, Xs: Array, Xt: Array) -> None:
        """Keep the displacement of the means."""
        self.displacement = Xt.mean(0) - Xs.mean(0)

    def transform(self, Xs: Array, batch_size: int = 0) -> Array:
        """Return the moved points."""
        return Xs + self.displacement


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and is not in the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", choices=FILES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 4, 8, 16, 32])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--solvers", nargs="+", default=[""], help="beginnings of their names")
    parser.add_argument("--budget", type=float, default=60, help="CPU seconds of training")
    parser.add_argument("--cache", type=Path, help="of what JAX compiles, from one run to the next")
    parser.add_argument("--out", type=Path, default=RESULTS / "peer_maps.jsonl")
    args = parser.parse_args(arguments)
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", str(args.cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for dim in args.dims:
        pair = None
        for seed in args.seeds:
            for solver, (config, run, seeded) in runs(args.pairs, args.budget).items():
                if not solver.startswith(tuple(args.solvers)) or (not seeded and seed != args.seeds[0]):
                    continue
                names = {"solver": solver, "pairs": args.pairs, "dim": dim, "seed": seed if seeded else None}
                if any(all(row.get(k) == v for k, v in names.items()) for row in read(args.out)):
                    continue
                pair = pair or Pair.load(args.data / FILES[args.pairs].format(dim), COSTS_OF[args.pairs])
                found = attempt(run, pair, seed)
                append(args.out, names | {"budget": args.budget if seeded else None} | found | {"config": config})
                print(solver, dim, seed, {k: v for k, v in found.items() if k != "curve"}, flush=True)
                jax.clear_caches()


def attempt(run: Callable[..., dict[str, Any]], pair: Pair, seed: int) -> dict[str, Any]:
    """Return a run's row, or why there is none."""
    try:
        return run(pair, seed)
    except NotImplementedError as error:
        return {"uvp": None, "cosine": None, "cpu_seconds": None, "note": f"not implemented for this cost: {error}"}


if __name__ == "__main__":
    main()
