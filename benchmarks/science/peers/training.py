"""Training of OTT-JAX's neural estimators for a budget of CPU seconds, by their own loops.

A budget begins when the first updates have been compiled; ``compile_cpu_seconds`` has what came before. The learning
rate decays along a cosine over the budget, as in OTT-JAX's tutorials over the updates. ``curve`` has CPU and wall
seconds since the very start, and L2-UVP on the way; the errors are measured with the clock stopped, and nothing is
chosen by them.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
import optax
from flax import linen as nn
from ott.geometry import costs, pointcloud
from ott.neural.methods import expectile_neural_dual, monge_gap, neuraldual
from ott.neural.networks import icnn, potentials
from ott.tools import sinkhorn_divergence

__all__ = ["COSTS", "Map", "Pair", "enot", "gap_estimator", "trained_dual", "w2_icnn", "w2_mlp"]

Array = np.ndarray
Map = Callable[[Array], Array]
CHECKS = 12


@dataclass
class Pair:
    """Samples of two measures, test samples with their true images, and the target's total variance."""

    x: Array
    y: Array
    test: Array
    true: Array
    variance: float
    cost: str

    @classmethod
    def load(cls, path: Path, cost: str) -> "Pair":
        """Read a pair."""
        with np.load(path) as z:
            arrays = [z[name].astype(np.float32) for name in ("train_x", "train_y", "test_x", "test_map")]
            return cls(*arrays, float(z["var_out"]), cost)

    def score(self, mapped: Array) -> dict[str, float]:
        """Return L2-UVP in %, and the cosine of displacements."""
        x, true, mapped = (a.astype(np.float64) for a in (self.test, self.true, np.asarray(mapped)))
        error = ((mapped - true) ** 2).sum(1).mean()
        own, best = mapped - x, true - x
        norms = np.sqrt((own**2).sum(1).mean() * (best**2).sum(1).mean())
        cosine = float((own * best).sum(1).mean() / norms) if norms > 0 else 0.0
        return {"uvp": float(f"{100 * error / self.variance:.5g}"), "cosine": float(f"{cosine:.5g}")}


# OTT-JAX's costs by our names.
COSTS = {"sqeuclidean": costs.SqEuclidean(), "euclidean": costs.Euclidean(), "pnorm(p=1.5)": costs.PNormP(1.5)}


class SpentError(Exception):
    """The budget is used up."""


@dataclass
class Clock:
    """Stops a training after a budget of CPU seconds, and keeps the errors on the way.

    Attributes:
        pair: Gives the samples.
        batch: Samples of each measure for an update.
        seed: Of the batches.
        budget: CPU seconds behind the first ``compiled`` updates.
        compiled: Updates that compile.
    """

    pair: Pair
    batch: int
    seed: int
    budget: float
    compiled: int
    updates: int = 0
    skipped: float = 0.0
    skipped_wall: float = 0.0
    compile_seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start the clock."""
        self.start, self.start_wall = time.process_time(), time.perf_counter()

    def cpu(self) -> float:
        """Return the CPU seconds since the start, without those of the measurements."""
        return time.process_time() - self.start - self.skipped

    def wall(self) -> float:
        """Return the wall seconds since the start, without those of the measurements."""
        return time.perf_counter() - self.start_wall - self.skipped_wall

    def fraction(self) -> float:
        """Return how much of the budget is spent."""
        return max(0.0, (self.cpu() - self.compile_seconds) / self.budget) if self.compile_seconds else 0.0

    def sources(
        self, wait: Callable[[], Any], mapped: Callable[[], Map], decay: Callable[[float], None]
    ) -> Iterator[Any]:
        """Yield batches of the source; between updates let the learning rate decay, measure, or stop.

        Args:
            wait: Waits for the last update.
            mapped: Returns the map as it is.
            decay: Sets the factor of the learning rates.
        """
        draws = np.random.default_rng(2 * self.seed)
        while True:
            wait()
            if self.updates == self.compiled:
                self.compile_seconds = self.cpu()
            if self.updates > self.compiled:
                done = self.fraction()
                if done >= (len(self.curve) + 1) / CHECKS:
                    self.measure(mapped())
                if done >= 1:
                    raise SpentError
                decay(max(0.01, 0.5 * (1 + np.cos(np.pi * done))))
            self.updates += 1
            yield jnp.asarray(self.pair.x[draws.integers(len(self.pair.x), size=self.batch)])

    def targets(self) -> Iterator[Any]:
        """Yield batches of the target."""
        draws = np.random.default_rng(2 * self.seed + 1)
        while True:
            yield jnp.asarray(self.pair.y[draws.integers(len(self.pair.y), size=self.batch)])

    def measure(self, current: Map) -> None:
        """Keep the error, with the clock stopped."""
        cpu, wall = time.process_time(), time.perf_counter()
        entry = [round(self.cpu(), 2), round(self.wall(), 2), self.pair.score(current(self.pair.test))["uvp"]]
        self.curve.append(entry)
        self.skipped += time.process_time() - cpu
        self.skipped_wall += time.perf_counter() - wall

    def row(self, current: Map) -> dict[str, Any]:
        """Return what a training found."""
        cpu, wall = self.cpu(), self.wall()
        return self.pair.score(current(self.pair.test)) | {
            "cpu_seconds": round(cpu, 2), "wall_seconds": round(wall, 2),
            "compile_cpu_seconds": round(self.compile_seconds, 2), "updates": self.updates, "curve": self.curve,
            "samples": len(self.pair.x),
        }  # fmt: skip


def adam(lr: float, **betas: float) -> optax.GradientTransformation:
    """Return Adam whose learning rate is a part of its state."""
    return optax.inject_hyperparams(optax.adam)(learning_rate=lr, **betas)


def with_rate(state: Any, lr: float) -> Any:
    """Return a state of training with another learning rate."""
    names = state.opt_state.hyperparams | {"learning_rate": jnp.asarray(lr, jnp.float32)}
    return state.replace(opt_state=state.opt_state._replace(hyperparams=names))


def trained_dual(
    pair: Pair, seed: int, budget: float, make: Callable[[Pair, jax.Array], Any], lr: float, batch: int
) -> dict[str, Any]:
    """Train one of OTT-JAX's neural duals by its own loop, and return its row without names."""
    # Potentials that take turns compile twice.
    clock = Clock(pair, batch, seed, budget, compiled=2)
    solver = make(pair, jax.random.key(seed))
    gradient = jax.jit(lambda state, x: dual_map(solver, state, x), static_argnums=())

    def decay(factor: float) -> None:
        solver.state_f, solver.state_g = with_rate(solver.state_f, factor * lr), with_rate(solver.state_g, factor * lr)

    def current() -> Map:
        return lambda x: np.asarray(gradient(solver.state_f, jnp.asarray(x)))

    def wait() -> None:
        jax.block_until_ready((solver.state_f.params, solver.state_g.params))

    source, target = clock.sources(wait, current, decay), clock.targets()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(SpentError):
            solver(source, target, clock.targets(), clock.targets())
    return clock.row(current())


def dual_map(solver: Any, state: Any, x: Any) -> Any:
    """Return the images under the potential f of a solver."""
    gradient = state.potential_gradient_fn(state.params)
    if isinstance(solver, expectile_neural_dual.ExpectileNeuralDual):
        # Its f is a potential of the cost: x - ∇h*(∇f), with h the squared norm.
        return x - 0.5 * jax.vmap(gradient)(x)
    # Its f is the convex potential itself.
    return gradient(x)


def w2_icnn(pair: Pair, rng: jax.Array) -> Any:
    """Return W2NeuralDual as in the first part of OTT-JAX's tutorial: a convex f, a free map for its conjugate."""
    dim, few = pair.x.shape[1], slice(0, 4096)
    return neuraldual.W2NeuralDual(
        dim,
        icnn.ICNN(
            dim_data=dim, dim_hidden=[64] * 4, pos_weights=True,
            gaussian_map_samples=(jnp.asarray(pair.x[few]), jnp.asarray(pair.y[few])),
        ),
        potentials.PotentialMLP(dim_hidden=[64] * 4, is_potential=False),
        adam(1e-3, b1=0.5, b2=0.5), adam(1e-3, b1=0.9, b2=0.999),
        num_train_iters=10**6, valid_freq=10**9, log_freq=10**9, pos_weights=True, rng=rng,
    )  # fmt: skip


def w2_mlp(pair: Pair, rng: jax.Array) -> Any:
    """Return W2NeuralDual as in the second part of OTT-JAX's tutorial: free potentials, taking turns."""
    return neuraldual.W2NeuralDual(
        pair.x.shape[1], potentials.PotentialMLP(dim_hidden=[64] * 4), potentials.PotentialMLP(dim_hidden=[64] * 4),
        adam(5e-3), adam(5e-3), num_train_iters=10**6, valid_freq=10**9, log_freq=10**9, rng=rng,
    )  # fmt: skip


def enot(pair: Pair, rng: jax.Array) -> Any:
    """Return ExpectileNeuralDual as in OTT-JAX's tutorial."""
    networks = [potentials.MLP(dim_hidden=[128] * 4 + [1], act_fn=jax.nn.elu) for _ in range(2)]
    return expectile_neural_dual.ExpectileNeuralDual(
        pair.x.shape[1], *networks, adam(5e-4, b1=0.9, b2=0.999), adam(5e-4, b1=0.9, b2=0.999),
        cost_fn=costs.SqEuclidean(), expectile=0.98, expectile_loss_coef=0.25,
        num_train_iters=10**6, valid_freq=10**9, log_freq=10**9, rng=rng,
    )  # fmt: skip


def gap_estimator(
    pair: Pair, seed: int, budget: float, weight: float, hidden: Sequence[int], batch: int, lr: float
) -> dict[str, Any]:
    """Train MongeGapEstimator by its own loop, with its tutorial's epsilons, and return its row without names."""
    clock = Clock(pair, batch, seed, budget, compiled=1)
    cost = COSTS[pair.cost]
    x, y = jnp.asarray(pair.x[:1024]), jnp.asarray(pair.y[:1024])
    fitting_epsilon = 0.1 * float(pointcloud.PointCloud(y).mean_cost_matrix)
    # As in the tutorial, which takes the squared cost's scale for both costs' regularizers.
    gap_epsilon = 0.01 * float(pointcloud.PointCloud(x, y).mean_cost_matrix)

    def fitting_loss(mapped: Any, target: Any) -> Any:
        value, out = sinkhorn_divergence.sinkdiv(mapped, target, epsilon=fitting_epsilon, static_b=True)
        return value, out.n_iters

    def regularizer(source: Any, mapped: Any) -> Any:
        value, out = monge_gap.monge_gap_from_samples(
            source, mapped, cost_fn=cost, epsilon=gap_epsilon, return_output=True
        )
        return value, out.n_iters

    solver = monge_gap.MongeGapEstimator(
        pair.x.shape[1], potentials.PotentialMLP(dim_hidden=hidden, is_potential=False, act_fn=nn.gelu), adam(lr),
        fitting_loss, regularizer, regularizer_strength=weight, num_train_iters=10**5, rng=jax.random.key(seed),
    )  # fmt: skip
    apply = jax.jit(lambda state, x: state.apply_fn({"params": state.params}, x))

    def decay(factor: float) -> None:
        solver.state_neural_net = with_rate(solver.state_neural_net, factor * lr)

    def current() -> Map:
        return lambda x: np.asarray(apply(solver.state_neural_net, jnp.asarray(x)))

    source = clock.sources(lambda: jax.block_until_ready(solver.state_neural_net.params), current, decay)
    with suppress(SpentError):
        solver.train_map_estimator(source, clock.targets(), clock.targets(), clock.targets())
    return clock.row(current())
