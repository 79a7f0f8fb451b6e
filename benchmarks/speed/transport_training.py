"""Training a map, ours against OTT-JAX: seconds for each step, and the quality that the steps buy.

    python -m benchmarks.speed.transport_training [--gaps none l2 l22] [--batches 256 512 1024] [--trainer]

The task is the Monge gap tutorial of OTT-JAX (docs/tutorials/neural/200_Monge_Gap): moons to an S-curve in the plane,
residual networks of widths 32, 64, 32 with GELU, Adam at 1e-3, a Sinkhorn divergence at 10 % of the mean cost within
the target, and a Monge gap at 1 % of the mean squared distance: Euclidean with weight 2 (l2), squared Euclidean with
weight 0.1 (l22), or none. Ours is ``MongeMap``'s training step in a plain loop, or with ``--trainer`` all that
Lightning's Trainer does as well, logging included; theirs is ``MongeGapEstimator``'s jitted step with
``static_b=True``, which leaves the target's constant self term out of the divergence. Both see the same batches, in
turns of ``--block`` steps; what is compiled is compiled before. The ratio is the median over the turns.

Quality is measured alike for both, in float64 on 2048 test samples: the Sinkhorn divergence to the target at the
training's epsilon, and on 1024 of them the exact Monge gap for either cost. Peers: ``pip install -r
benchmarks/requirements.txt`` beside this package.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader

from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from benchmarks.science.monge_gap.tasks import moon, s_curve
from lightning_gap import MongeMap, monge_gap, sinkhorn_divergence
from lightning_gap.monge import ResidualMLP, divergence_and_gap
from lightning_gap.monge.costs import resolve
from lightning_gap.monge.ot.epsilon import Epsilon, Weighted

HIDDEN = (32, 64, 32)
# Name of the gap: its cost and its weight.
GAPS = {"none": ("sqeuclidean", 0.0), "l2": ("euclidean", 2.0), "l22": ("sqeuclidean", 0.1)}
TEST_SAMPLES, EXACT_SAMPLES = 2048, 1024

Batches = list[tuple[np.ndarray, np.ndarray]]


def batches(count: int, size: int) -> Batches:
    """Return the batches of a training, fresh samples in each."""
    source, target = np.random.RandomState(1), np.random.RandomState(2)
    return [
        (moon(size, int(source.randint(0, 100_000))), s_curve(size, int(target.randint(0, 100_000))))
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Task:
    """What both sides are given."""

    cost: str
    weight: float
    fitting_epsilon: float
    gap_epsilon: float
    batches: Batches = field(repr=False)
    seed: int

    @classmethod
    def make(cls, gap: str, size: int, iterations: int, seed: int) -> "Task":
        """Draw the batches and decide both epsilons from the first of them."""
        cost, weight = GAPS[gap]
        drawn = batches(iterations, size)
        x, y = (torch.from_numpy(samples) for samples in drawn[0])
        squared = resolve("sqeuclidean")
        x, y = Weighted(x), Weighted(y)
        fitting, regularizing = (
            Epsilon(share=0.1).resolve(squared, (y, y)),
            Epsilon(share=0.01).resolve(squared, (x, y)),
        )
        return cls(cost, weight, fitting, regularizing, drawn, seed)


class Ours:
    """Our side, in a plain loop."""

    def __init__(self, task: Task) -> None:
        seed_everything(task.seed, verbose=False)
        self.task = task
        self.model = MongeMap(
            map=ResidualMLP(2, HIDDEN), cost=task.cost, fitting_loss="sinkhorn", fitting_epsilon=task.fitting_epsilon,
            gap_epsilon=task.gap_epsilon, gap_weight=task.weight, optimizer=partial(Adam, lr=1e-3),
        )  # fmt: skip
        # The peer's network does not start at the identity: the same initialization for both.
        last = self.model.map.displacement[-1]
        torch.nn.init.normal_(last.weight, std=last.in_features**-0.5)
        self.optimizer = self.model.configure_optimizers()
        self.batches = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in task.batches]
        self.loss(*self.batches[0]).backward()
        self.optimizer.zero_grad()

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        """Return what ``MongeMap.training_step`` returns, without logging."""
        mapped = self.model(source)
        if not self.task.weight:
            return sinkhorn_divergence(mapped, target, epsilon=self.task.fitting_epsilon)
        divergence, gap = divergence_and_gap(
            source, mapped, target, fitting_epsilon=self.task.fitting_epsilon, cost=self.task.cost,
            gap_epsilon=self.task.gap_epsilon,
        )  # fmt: skip
        return divergence + self.task.weight * gap

    def steps(self, part: slice) -> None:
        """Train on some of the batches."""
        for source, target in self.batches[part]:
            self.optimizer.zero_grad()
            self.loss(source, target).backward()
            self.optimizer.step()

    def network_ms(self) -> float:
        """Return the milliseconds of a step whose loss costs nothing: network, autograd and Adam."""
        spent = []
        for source, target in self.batches[:40]:
            start = time.perf_counter()
            self.optimizer.zero_grad()
            (self.model(source) - target).square().mean().backward()
            self.optimizer.step()
            spent.append(1e3 * (time.perf_counter() - start))
        return float(np.median(spent))

    def transport(self, x: np.ndarray) -> np.ndarray:
        """Return the images of samples."""
        return self.model.transport(x).numpy()


class Theirs:
    """OTT-JAX's side."""

    def __init__(self, task: Task) -> None:
        import jax
        import jax.numpy as jnp
        import optax
        from flax import linen
        from ott.geometry import costs
        from ott.neural.methods.monge_gap import MongeGapEstimator, monge_gap_from_samples
        from ott.neural.networks.potentials import PotentialMLP
        from ott.tools.sinkhorn_divergence import sinkdiv

        ground = {"sqeuclidean": costs.SqEuclidean(), "euclidean": costs.Euclidean()}[task.cost]

        def fit(mapped: Any, target: Any) -> tuple[Any, Any]:
            divergence, output = sinkdiv(mapped, target, epsilon=task.fitting_epsilon, static_b=True)
            return divergence, output.n_iters

        def regularize(source: Any, mapped: Any) -> tuple[Any, Any]:
            options = {"cost_fn": ground, "epsilon": task.gap_epsilon, "return_output": True}
            gap, output = monge_gap_from_samples(source, mapped, **options)
            return gap, output.n_iters

        estimator = MongeGapEstimator(
            dim_data=2,
            model=PotentialMLP(dim_hidden=HIDDEN, is_potential=False, act_fn=linen.gelu),
            optimizer=optax.adam(1e-3),
            fitting_loss=fit,
            regularizer=regularize if task.weight else None,
            regularizer_strength=task.weight,
            num_train_iters=len(task.batches),
            rng=jax.random.PRNGKey(task.seed),
        )
        self.batches = [{"source": jnp.asarray(x), "target": jnp.asarray(y)} for x, y in task.batches]
        self.state, self.step, self.ready = estimator.state_neural_net, estimator.step_fn, jax.block_until_ready
        # The step returns a new state: this one, which compiles it, is thrown away.
        self.ready(self.step(self.state, self.batches[0], None, False, 0)[0].params)

    def steps(self, part: slice) -> None:
        """Train on some of the batches."""
        for number in range(len(self.batches))[part]:
            self.state, _ = self.step(self.state, self.batches[number], None, False, number)
        self.ready(self.state.params)

    def transport(self, x: np.ndarray) -> np.ndarray:
        """Return the images of samples."""
        return np.array(self.state.apply_fn({"params": self.state.params}, x))


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turns(count: int, block: int) -> Iterator[slice]:
    """Yield the batches of each turn."""
    for start in range(0, count, block):
        yield slice(start, min(start + block, count))


def plain_race(ours: Ours, theirs: Theirs, block: int) -> np.ndarray:
    """Train both in turns; return ``(turns, 2)`` seconds for each step."""
    times = []
    for number, part in enumerate(turns(len(ours.batches), block)):
        count = part.stop - part.start
        # Who goes first alternates, so that neither always finds the other's caches.
        sides = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        spent = {side: seconds(lambda side=side, part=part: side.steps(part)) / count for side in sides}
        times.append((spent[ours], spent[theirs]))
    return np.array(times)


class PeerInTurn(Callback):
    """Runs the peer's turn after each of the trainer's, and keeps the seconds for each step of both."""

    def __init__(self, peer: Theirs, count: int, block: int) -> None:
        self.peer = peer
        self.parts = list(turns(count, block))
        self.times: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the trainer's first turn."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the trainer's turn where it is over."""
        part = self.parts[len(self.times)]
        if batch_idx + 1 < part.stop:
            return
        mine, count = time.perf_counter() - self.start, part.stop - part.start
        self.times.append((mine / count, seconds(lambda: self.peer.steps(part)) / count))
        self.start = time.perf_counter()


def trainer_race(ours: Ours, theirs: Theirs, block: int) -> np.ndarray:
    """Train ours with Lightning's Trainer, and theirs in turns; return ``(turns, 2)`` seconds for each step."""
    peer = PeerInTurn(theirs, len(ours.batches), block)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[peer],
    )
    trainer.fit(ours.model, DataLoader(ours.batches, batch_size=None))
    return np.array(peer.times)


@dataclass(frozen=True)
class Quality:
    """How good a map is on test samples; lower is better."""

    divergence: float
    gap_l2: float
    gap_l22: float

    @classmethod
    def of(cls, transport: Callable[[np.ndarray], np.ndarray], epsilon: float) -> "Quality":
        """Measure a map in float64."""
        x = moon(TEST_SAMPLES, 424_242)
        mapped = torch.from_numpy(transport(x)).double()
        target = torch.from_numpy(s_curve(TEST_SAMPLES, 434_343)).double()
        divergence = sinkhorn_divergence(mapped, target, epsilon=epsilon, tolerance=1e-6, max_iterations=20_000)
        pairs = torch.from_numpy(x).double()[:EXACT_SAMPLES], mapped[:EXACT_SAMPLES]
        gaps = (monge_gap(*pairs, cost=cost, solver="exact") for cost in ("euclidean", "sqeuclidean"))
        return cls(float(divergence), *map(float, gaps))

    @staticmethod
    def texts(found: "list[Quality]") -> list[str]:
        """Return the row's cells: means, and standard deviations where there are several runs."""
        values = np.array([(q.divergence, q.gap_l2, q.gap_l22) for q in found])
        spreads = values.std(axis=0, ddof=1) if len(found) > 1 else [None] * 3
        return [
            f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
            for mean, spread in zip(values.mean(axis=0), spreads, strict=True)
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaps", nargs="+", choices=GAPS, default=list(GAPS))
    parser.add_argument("--batches", type=int, nargs="+", default=[256], help="samples in a batch")
    parser.add_argument("--iterations", type=int, default=1000, help="steps of training")
    parser.add_argument("--block", type=int, default=20, help="steps in a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of both networks' first weights, one run each"
    )
    parser.add_argument("--trainer", action="store_true", help="run ours through Lightning's Trainer")
    add_json(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    torch.set_num_threads(args.threads)
    how = "Trainer" if args.trainer else "plain loop"
    table = Table(
        title=f"{args.iterations} steps, ours ({how}) against OTT-JAX ({torch.get_num_threads()} threads)",
        caption="divergence: test Sinkhorn divergence; gaps: exact, 1024 test samples; lower is better",
    )
    console = Console(width=150)
    columns = ("gap", "batch", "", "ms/step", "network alone", "training s", "ratio", "divergence", "l2 gap", "l22 gap")
    for column in columns:
        table.add_column(column, justify="right")
    for gap in args.gaps:
        for size in args.batches:
            console.print(f"gap {gap}, batch {size} ...", style="dim")
            # The last turn may be shorter than the others.
            steps = np.array([part.stop - part.start for part in turns(args.iterations, args.block)])
            runs, qualities = [], []
            for seed in args.seeds:
                task = Task.make(gap, size, args.iterations, seed)
                ours, theirs = Ours(task), Theirs(task)
                runs.append((trainer_race if args.trainer else plain_race)(ours, theirs, args.block))
                qualities.append([Quality.of(side.transport, task.fitting_epsilon) for side in (ours, theirs)])
            times, network = np.concatenate(runs), ours.network_ms()
            ratio = float(np.median(times[:, 1] / times[:, 0]))
            found: dict[str, object] = {"gap": gap, "batch": size, "ours": how}
            found |= {"ms a step": spread(times[:, 0], 1e3), "OTT-JAX, ms": spread(times[:, 1], 1e3)}
            found["OTT-JAX / ours"] = ratios(times[:, 1], times[:, 0])
            for k, side in enumerate(("ours", "OTT-JAX")):
                found[f"divergence, {side}"] = Quality.texts([pair[k] for pair in qualities])[0]
            rows.append(found)
            for k, name in enumerate(("ours", "OTT-JAX")):
                table.add_row(
                    *((gap, str(size)) if k == 0 else ("", "")),
                    name,
                    f"{1e3 * float(np.median(times[:, k])):.2f}",
                    f"{network:.2f}" if k == 0 else "",
                    f"{float(np.mean([run[:, k] @ steps for run in runs])):.1f}",
                    f"{ratio:.1f}" if k == 0 else "",
                    *Quality.texts([pair[k] for pair in qualities]),
                    end_section=k == 1,
                )
    console.print(table)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
