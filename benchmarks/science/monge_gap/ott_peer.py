"""The same rows by OTT-JAX's MongeGapEstimator, in an environment of its own (benchmarks/requirements.txt).

    python -m benchmarks.science.monge_gap.suite
    PEER/bin/python -m benchmarks.science.monge_gap.ott_peer
    python -m benchmarks.science.monge_gap.suite

It reads samples, epsilons, weights and settings from where suite.py left them, trains, and writes the images of the
test samples beside the samples, for suite.py to score. On one thread; seconds are the process's CPU time in
``train_map_estimator``, with what JAX compiles there.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from flax import linen as nn
from ott.geometry import costs
from ott.neural.methods import monge_gap
from ott.neural.networks import potentials
from ott.tools import sinkhorn_divergence

from benchmarks.science.monge_gap.settings import GAPS, RUNS, SEEDS

HERE = Path(__file__).parent
COSTS = {"euclidean": costs.Euclidean(), "sqeuclidean": costs.SqEuclidean(), "pnorm(p=1.5)": costs.PNormP(1.5)}


def batches(samples: np.ndarray, size: int, seed: int) -> Iterator[jax.Array]:
    """Yield batches for ever, each epoch through all samples in an order of its own."""
    draws = np.random.default_rng(seed)
    while True:
        order = draws.permutation(len(samples))
        for start in range(0, len(order) - size + 1, size):
            yield jnp.asarray(samples[order[start : start + size]])


def train(path: Path, gap: str, seed: int, updates: int | None) -> None:
    """Train a map, and write the images of the test samples and the CPU seconds it took."""
    out = path.parent / f"ott_{gap}.npz"
    if out.exists():
        return
    settings = yaml.safe_load((HERE / "tutorial.yaml").read_text())
    chosen = yaml.safe_load((HERE / "gaps" / f"{gap}.yaml").read_text())["model"]
    network = settings["model"]["map"]["init_args"]
    updates = updates or settings["trainer"]["max_steps"]
    with np.load(path) as file:
        z: dict[str, Any] = {name: file[name] for name in file.files}

    @jax.jit
    def fitting_loss(mapped: jax.Array, target: jax.Array) -> tuple[jax.Array, int]:
        # static_b, as in the tutorial: the target's own term does not depend on the map.
        value, output = sinkhorn_divergence.sinkdiv(mapped, target, epsilon=float(z["fitting_epsilon"]), static_b=True)
        return value, output.n_iters

    def regularizer(source: jax.Array, mapped: jax.Array) -> tuple[jax.Array, int]:
        cost = COSTS[chosen["cost"]]
        value, output = monge_gap.monge_gap_from_samples(
            source, mapped, cost_fn=cost, epsilon=float(z["gap_epsilon"]), return_output=True
        )
        return value, output.n_iters

    estimator = monge_gap.MongeGapEstimator(
        dim_data=network["dim"],
        fitting_loss=fitting_loss,
        regularizer=regularizer if chosen["gap_weight"] else None,
        regularizer_strength=chosen["gap_weight"],
        model=potentials.PotentialMLP(
            dim_hidden=network["hidden"], is_potential=False, act_fn=getattr(nn, network["activation"])
        ),
        optimizer=optax.adam(settings["model"]["optimizer"]["init_args"]["lr"]),
        num_train_iters=updates,
        # It validates once at least: on one batch of the training samples, at the end.
        valid_freq=updates,
        rng=jax.random.key(seed),
    )
    make = partial(batches, size=settings["data"]["batch_size"])
    started = time.process_time()
    state, _ = estimator.train_map_estimator(
        make(z["train_x"], seed=4 * seed),
        make(z["train_y"], seed=4 * seed + 1),
        make(z["train_x"], seed=4 * seed + 2),
        make(z["train_y"], seed=4 * seed + 3),
    )
    mapped = np.asarray(state.apply_fn({"params": state.params}, jnp.asarray(z["test_x"])))
    seconds = time.process_time() - started
    np.savez(out, mapped=mapped, seconds=seconds, updates=updates)
    print(f"{path.parent} {gap}: {seconds:.1f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaps", nargs="+", choices=GAPS, default=list(GAPS))
    parser.add_argument("--tasks", nargs="+", help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--updates", type=int, help="updates in place of the configuration's")
    args = parser.parse_args(arguments)
    # Seed by seed.
    for path in sorted(args.runs.glob("*/*/samples.npz"), key=lambda path: (path.parent.name, path)):
        task, seed = path.parts[-3], int(path.parts[-2])
        for gap in args.gaps if seed in args.seeds and task in (args.tasks or [task]) else ():
            train(path, gap, seed, args.updates)


if __name__ == "__main__":
    main()
