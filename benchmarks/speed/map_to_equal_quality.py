"""How long ``MongeMap`` and OTT-JAX's ``MongeGapEstimator`` train until their maps are equally good.

    python -m benchmarks.speed.map_to_equal_quality moons [--peers PYTHON] [--seeds 0 1 2]
    python -m benchmarks.speed.map_to_equal_quality w2 --data FOLDER [--dims 8] [--peers PYTHON]

Both sides train in processes of their own, one after the other: ours with this Python, theirs with ``--peers``, a
Python that has OTT-JAX (``pip install -r benchmarks/requirements.txt``) and this package. A side stops at the first
check on test samples that meets the level. Checks are outside of the clock, and so are imports, drawing the data, and
OTT-JAX's compilation, which is given apart. The seconds are those of the processor, in which all threads count, and
which a busy machine disturbs less, and those of the wall. All else being equal a map that is checked more often meets a
level sooner: both are checked after as many steps.

``moons``: the task of ``transport_training.py`` with a squared Euclidean gap, the same network, objective, batches and
optimizer on both sides, ours by a plain loop of ``MongeMap``'s loss. The level is a Sinkhorn divergence on 1024 test
samples and an exact Monge gap on these.

``w2``: the Wasserstein-2 benchmark pairs, see ``transport_maps.py``, whose recipe is ours; its start, a transport plan
of all samples, counts. Theirs is a perceptron of widths 128, 128, 128, Adam at 1e-3, batches of 512, default epsilons
and gap weight 1, the best of 0, 0.1 and 1 in eight dimensions. The level is an L2-UVP in %. Both recipes were fixed
before; the level only says when the clock stops.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from benchmarks.processes import run_module

# The levels: of moons, and of w2 by dimension.
DIVERGENCE, GAP = 0.03, 0.1
UNEXPLAINED = {2: 2.0, 4: 4.0, 8: 10.0, 16: 30.0, 32: 50.0}
SAMPLES = 1024


class Clock:
    """Seconds of the processor and of the wall while it runs."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def start(self) -> None:
        self.begin = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.cpu += time.process_time() - self.begin[0]
        self.wall += time.perf_counter() - self.begin[1]


Quality = dict[str, float]


def meets(quality: Quality, level: Quality) -> bool:
    """Say whether each number is no more than its level."""
    return all(quality.get(name, math.inf) <= level[name] for name in level)


def train(
    advance: Callable[[slice], None], quality: Callable[[], Quality], level: Quality, args: argparse.Namespace
) -> dict[str, Any]:
    """Advance and check in turns, until a map is good or the training has come to its end."""
    clock, found = Clock(), {}
    for part in (slice(k, min(k + args.every, args.steps)) for k in range(0, args.steps, args.every)):
        clock.start()
        advance(part)
        clock.stop()
        found = {"quality": quality(), "steps": part.stop}
        if meets(found["quality"], level) or clock.wall > args.limit:
            break
    return found | {"cpu": clock.cpu, "wall": clock.wall}


def moons_side(side: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train on moons until a map is good."""
    from benchmarks.speed import transport_training as tt
    from lightning_gap import monge_gap, sinkhorn_divergence

    level = level_of("moons", args)
    task = tt.Task.make("l22", 256, args.steps, seed)
    begin = time.perf_counter()
    player = (tt.Ours if side == "ours" else tt.Theirs)(task)
    compiling = time.perf_counter() - begin
    # The seeds of the test samples are those of no batch.
    x, target = tt.moon(SAMPLES, 424_242), torch.from_numpy(tt.s_curve(SAMPLES, 434_343)).double()

    def quality() -> Quality:
        mapped = torch.from_numpy(player.transport(x)).double()
        divergence = float(sinkhorn_divergence(mapped, target, epsilon=task.fitting_epsilon, tolerance=1e-5))
        if divergence > level["divergence"]:  # the exact gap takes seconds
            return {"divergence": divergence}
        gap = float(monge_gap(torch.from_numpy(x).double(), mapped, solver="exact"))
        return {"divergence": divergence, "gap": gap}

    return train(player.steps, quality, level, args) | {"compiling": compiling}


def pairs(data: Path, dim: int) -> dict[str, np.ndarray]:
    """Return the arrays of a benchmark pair."""
    with np.load(data / f"w2_mix3to10_D{dim}.npz") as file:
        return {name: file[name] for name in file.files}


def unexplained(arrays: dict[str, np.ndarray], mapped: np.ndarray) -> float:
    """Return L2-UVP in %."""
    return 100 * float(np.square(mapped - arrays["test_map"]).sum(1).mean()) / float(arrays["var_out"])


def our_w2(arrays: dict[str, np.ndarray], level: Quality, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train the recipe of ``transport_maps.py`` by Lightning's Trainer until it is good."""
    import logging
    import warnings

    from lightning.pytorch import Callback, Trainer, seed_everything

    from benchmarks.science import transport_maps as tm
    from lightning_gap import MongeMap, SamplesDataModule

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock, found = Clock(), {}
    updates = min(tm.UPDATES, args.steps)

    class Check(Callback):
        """Stops the clock, and the trainer when the map is good."""

        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            clock.start()

        def check(self, trainer: Trainer, model: MongeMap) -> None:
            clock.stop()
            quality = {"L2-UVP, %": unexplained(arrays, model.transport(arrays["test_x"]).numpy())}
            found.update(quality=quality, steps=trainer.global_step)
            trainer.should_stop = meets(quality, level) or clock.wall > args.limit
            clock.start()

        def on_train_batch_end(self, trainer: Trainer, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            # The first update comes after the start, which may be good already.
            if trainer.global_step % args.every == 0 or trainer.global_step in (1, updates):
                self.check(trainer, model)

    seed_everything(seed, verbose=False)
    model = tm.recipe(arrays["train_x"].shape[1], tm.UPDATES)
    samples = (torch.from_numpy(arrays[name]) for name in ("train_x", "train_y"))
    data = SamplesDataModule(*samples, batch_size=tm.BATCH, val_fraction=0, seed=seed)
    Trainer(
        max_steps=updates, limit_val_batches=0, num_sanity_val_steps=0, accelerator="cpu", callbacks=[Check()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, min_steps=1,
    ).fit(model, data)  # fmt: skip
    return found | {"cpu": clock.cpu, "wall": clock.wall, "compiling": 0.0}


def their_w2(arrays: dict[str, np.ndarray], level: Quality, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train OTT-JAX's estimator until it is good."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen
    from ott.geometry import costs
    from ott.neural.methods.monge_gap import MongeGapEstimator, monge_gap_from_samples
    from ott.neural.networks.potentials import PotentialMLP
    from ott.tools.sinkhorn_divergence import sinkdiv

    draws = np.random.RandomState(seed)
    size = min(512, len(arrays["train_x"]))

    def batches(samples: np.ndarray) -> Iterator[Any]:
        while True:
            yield jnp.asarray(samples[draws.randint(0, len(samples), size)])

    def fit(mapped: Any, target: Any) -> tuple[Any, Any]:
        divergence, output = sinkdiv(mapped, target, static_b=True)
        return divergence, output.n_iters

    def regularize(source: Any, mapped: Any) -> tuple[Any, Any]:
        gap, output = monge_gap_from_samples(source, mapped, cost_fn=costs.SqEuclidean(), return_output=True)
        return gap, output.n_iters

    source, target = batches(arrays["train_x"]), batches(arrays["train_y"])
    estimator = MongeGapEstimator(
        dim_data=arrays["train_x"].shape[1],
        fitting_loss=fit,
        regularizer=regularize,
        regularizer_strength=1.0,
        model=PotentialMLP(dim_hidden=[128, 128, 128], is_potential=False, act_fn=linen.gelu),
        optimizer=optax.adam(1e-3),
        num_train_iters=100_000,
        rng=jax.random.PRNGKey(seed),
    )
    state = estimator.state_neural_net
    begin = time.perf_counter()
    batch = {"source": next(source), "target": next(target)}
    jax.block_until_ready(estimator.step_fn(state, batch, None, False, 0)[0].params)
    compiling = time.perf_counter() - begin

    def advance(part: slice) -> None:
        nonlocal state
        for number in range(part.start, part.stop):
            batch = {"source": next(source), "target": next(target)}
            state, _ = estimator.step_fn(state, batch, None, False, number)
        jax.block_until_ready(state.params)

    def quality() -> Quality:
        mapped = np.asarray(state.apply_fn({"params": state.params}, jnp.asarray(arrays["test_x"])))
        return {"L2-UVP, %": unexplained(arrays, mapped)}

    return train(advance, quality, level, args) | {"compiling": compiling}


def shown(quality: Quality) -> str:
    """Return the numbers with their names."""
    return ", ".join(f"{name} {value:.3g}" for name, value in quality.items())


def level_of(task: str, args: argparse.Namespace) -> Quality:
    """Return the level of moons, or of a dimension of w2."""
    if task == "moons":
        return {"divergence": args.divergence, "gap": args.gap}
    return {"L2-UVP, %": args.unexplained or UNEXPLAINED[int(task)]}


def one_side(side: str, task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a side of a task in this process."""
    level = level_of(task, args)
    if task == "moons":
        found = moons_side(side, seed, args)
    else:
        found = (our_w2 if side == "ours" else their_w2)(pairs(args.data, int(task)), level, seed, args)
    return found | {"reached": meets(found["quality"], level)}


def one_side_apart(side: str, task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a side of a task in a process of its Python."""
    python = args.peers if side == "ott" and args.peers else sys.executable
    words = (*sys.argv[1:], "--side", side, task, str(seed))
    done = run_module("benchmarks.speed.map_to_equal_quality", *words, python=python, capture_output=True)
    if done.returncode:
        sys.exit(f"{side}, {task}: {done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def times_ours(found: dict[str, list[dict[str, Any]]], key: str) -> Any:
    """Return how many times as long the peer took, seed by seed, as far as both came to the level."""
    ours, theirs = found["ours"], found["ott"]
    if not all(run["reached"] for run in ours):
        return "ours did not reach the level"
    taken = ratios([run[key] for run in theirs], [run[key] for run in ours])
    return taken if all(run["reached"] for run in theirs) else f"more than {taken['median']:.3g}"


def main() -> None:
    """Train both sides in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=("moons", "w2"))
    parser.add_argument("--peers", type=Path, help="a Python with OTT-JAX and this package")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIGHTNING_GAP_DATA", "data")))
    parser.add_argument("--dims", type=int, nargs="+", default=[8], help="of w2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=25, help="steps from one check to the next")
    parser.add_argument("--steps", type=int, default=2000, help="of a training, at most")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a training, at most")
    parser.add_argument("--divergence", type=float, default=DIVERGENCE, help="the level of moons")
    parser.add_argument("--gap", type=float, default=GAP, help="the level of moons")
    parser.add_argument("--unexplained", type=float, help="the level of w2, an L2-UVP in %%")
    parser.add_argument("--threads", type=int, help="torch's threads; OTT-JAX has those of its own")
    add_json(parser)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.side:
        side, task, seed = args.side
        print(json.dumps(one_side(side, task, int(seed), args)))
        return
    rows: list[Row] = []
    for task in [t for name in args.tasks for t in (["moons"] if name == "moons" else map(str, args.dims))]:
        title = "moons to an S-curve" if task == "moons" else f"W2 benchmark, D = {task}"
        level = shown(level_of(task, args))
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "ott": []}
        for seed in args.seeds:
            for side, runs in found.items():
                runs.append(one_side_apart(side, task, seed, args))
                run = runs[-1]
                verdict = f"{'reached' if run['reached'] else 'not reached'}, {shown(run['quality'])}"
                print(f"{title}, seed {seed}, {side}: {verdict}, {run['steps']} steps, ", end="")
                print(f"{run['cpu']:.1f} s of the processor, {run['wall']:.1f} s, compiling {run['compiling']:.1f} s")
                sys.stdout.flush()
        for side, runs in found.items():
            reached = sum(run["reached"] for run in runs)
            row: dict[str, Any] = {"task": title, "level": level, "side": "MongeMap" if side == "ours" else "OTT-JAX"}
            row["reached"] = f"{reached} of {len(runs)}"
            # A side may be far below the level when it is first checked.
            last = {name: [run["quality"].get(name, math.nan) for run in runs] for name in level_of(task, args)}
            row["at the stop, median"] = shown({name: float(np.median(values)) for name, values in last.items()})
            for name, key in (("steps", "steps"), ("processor, s", "cpu"), ("wall, s", "wall")):
                row[name] = spread([run[key] for run in runs])
            row["compiling, s"] = spread([run["compiling"] for run in runs]) if side == "ott" else ""
            for name, key in (("processor, × ours", "cpu"), ("wall, × ours", "wall")):
                row[name] = times_ours(found, key) if side == "ott" else ""
            rows.append(row)
    print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
