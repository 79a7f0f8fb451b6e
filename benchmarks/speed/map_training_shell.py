"""What a training step of MongeMap costs beside the engine, on several processes, and on large batches.

    python -m benchmarks.speed.map_training_shell step [--batches 256:2 1024:32] [--steps 200] [--parts]
    python -m benchmarks.speed.map_training_shell ddp [--processes 2 4] [--steps 50]
    python -m benchmarks.speed.map_training_shell large [--batches 4096:2 16384:2]

``step``: MongeMap under Lightning's Trainer, without logger and progress bar, against a plain loop of the same network,
``divergence_and_gap`` and Adam, on the same batches, in turns of ten steps. Both start at the same weights, and must
have the same losses in the first turns. "Bare module" is the plain loop's loss as a LightningModule that logs nothing,
likewise against the plain loop: what the Trainer alone costs. Seconds are those of the processor (one thread), which a
busy machine disturbs less; ratios are medians over the turns. ``--parts`` also prints the milliseconds a step within
functions of the shell.

``ddp``: the same fit by one process and by several (gloo) at the same global batch; the largest relative difference of
the losses over all steps and ranks.

``large``: seconds of one step under the Trainer, and how far memory rises above that of a process that has done a step
of 64 samples; each size in a process of its own.

Sources are standard Gaussians, targets mixtures of four Gaussians. A batch is SAMPLES:DIMENSION.
"""

import argparse
import logging
import multiprocessing
import os
import platform
import resource
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader

from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import ResidualMLP, UnpairedBatch, divergence_and_gap
from lightning_gap.monge.costs import resolve
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, GAP_SHARE, Epsilon, Weighted

HIDDEN = (128, 128, 128)
TURN = 10


def samples(n: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ``(n, dim)`` samples of source and target."""
    draws = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(4, dim, generator=torch.Generator().manual_seed(99))
    target = means[torch.randint(0, 4, (n,), generator=draws)] + 0.5 * torch.randn(n, dim, generator=draws)
    return torch.randn(n, dim, generator=draws), target


def quiet_trainer(**options: Any) -> Trainer:
    """Return a trainer that does nothing but train."""
    return Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


class Bare(LightningModule):
    """A network and the engine, and nothing else."""

    def __init__(self, net: ResidualMLP, batch: UnpairedBatch) -> None:
        super().__init__()
        self.net = net
        squared = resolve("sqeuclidean")
        source, target = Weighted(batch.source), Weighted(batch.target)
        self.fitting_epsilon = Epsilon(share=FITTING_SHARE).resolve(squared, (target, target))
        self.gap_epsilon = Epsilon(share=GAP_SHARE).resolve(squared, (source, target))

    def training_step(self, batch: UnpairedBatch, batch_idx: int) -> Tensor:
        """Return the loss."""
        divergence, gap = divergence_and_gap(
            batch.source, self.net(batch.source), batch.target, fitting_epsilon=self.fitting_epsilon,
            gap_epsilon=self.gap_epsilon,
        )  # fmt: skip
        return divergence + gap

    def configure_optimizers(self) -> Adam:
        """Return Adam."""
        return Adam(self.net.parameters(), lr=1e-3)


class PlainLoop:
    """The same in a loop."""

    def __init__(self, bare: Bare, batches: list[UnpairedBatch]) -> None:
        self.bare, self.batches = bare, batches
        self.optimizer = bare.configure_optimizers()
        self.losses: list[Tensor] = []

    def steps(self, first: int, last: int) -> None:
        """Train on some of the batches."""
        for number in range(first, last):
            loss = self.bare.training_step(self.batches[number], number)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach())


class InTurns(Callback):
    """Runs a turn of the plain loop after each of the trainer's, and keeps the seconds a step of both."""

    def __init__(self, plain: PlainLoop) -> None:
        self.plain = plain
        self.losses: list[Tensor] = []
        self.seconds: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trainer's first turn."""
        self.start = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the trainer's turn where it is over."""
        self.losses.append(outputs["loss"])
        if (batch_idx + 1) % TURN:
            return
        middle = time.process_time()
        self.plain.steps(batch_idx + 1 - TURN, batch_idx + 1)
        end = time.process_time()
        self.seconds.append(((middle - self.start) / TURN, (end - middle) / TURN))
        self.start = time.process_time()


def step(size: int, dim: int, steps: int, *, bare: bool) -> list[tuple[float, float]]:
    """Return the seconds of a step under the trainer and of the plain loop, in each turn."""
    batches = [UnpairedBatch(*samples(size, dim, seed)) for seed in range(steps)]
    torch.manual_seed(0)
    net, same = ResidualMLP(dim, HIDDEN), ResidualMLP(dim, HIDDEN)
    same.load_state_dict(net.state_dict())
    turns = InTurns(PlainLoop(Bare(same, batches[0]), batches))
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    quiet_trainer(max_steps=steps, callbacks=[turns]).fit(Bare(net, batches[0]) if bare else MongeMap(map=net), loader)
    ours, theirs = (torch.stack(losses[: 3 * TURN]) for losses in (turns.losses, turns.plain.losses))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.0)
    return turns.seconds[1:]  # the first turn has both sides' first calls


class Stopwatch:
    """Seconds within functions, by name; what a watched function calls counts for both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str) -> None:
        """Count the seconds of an attribute of a class or module from now on."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[f"{owner.__name__.rsplit('.', 1)[-1]}.{name}"] += time.process_time() - start

        setattr(owner, name, timed)


def parts(size: int, dim: int, steps: int) -> dict[str, float]:
    """Return the milliseconds a step in the parts of a step."""
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from torch.optim.optimizer import Optimizer

    from lightning_gap.monge import module, training_loss
    from lightning_gap.monge.objective import MapObjective
    from lightning_gap.monge.training_log import TrainingLog

    stopwatch = Stopwatch()
    for owner, names in (
        (_TrainingEpochLoop, ["advance"]),
        (MongeMap, ["training_step", "backward"]),
        (module, ["checked", "training_loss"]),
        (training_loss, ["images", "data_parallel_group"]),
        (TrainingLog, ["keep", "write"]),
        (MapObjective, ["terms"]),
        (Optimizer, ["zero_grad"]),
    ):
        for name in names:
            stopwatch.watch(owner, name)
    loader = DataLoader([UnpairedBatch(*samples(size, dim, seed)) for seed in range(steps)], batch_size=None)  # type: ignore[arg-type]
    quiet_trainer(max_steps=steps).fit(MongeMap(map=ResidualMLP(dim, HIDDEN)), loader)
    return {name: 1e3 * seconds / steps for name, seconds in stopwatch.seconds.items()}


class Record(Callback):
    """Writes each step's loss on a rank."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all losses."""
        torch.save(torch.tensor(self.losses, dtype=torch.float64), Path(self.folder) / f"{trainer.global_rank}.pt")


CASES: dict[str, dict[str, Any]] = {
    "the default": {},
    "divergence and gap": {"map": True},
    "energy distance and gap": {"map": True, "fitting_loss": "energy"},
    "by condition": {"conditions": True},
}


def losses(processes: int, steps: int, size: int, dim: int, *, conditions: bool = False, **options: Any) -> Tensor:
    """Return ``(processes, steps)`` losses of a fit."""
    labels = {"conditions": ([k % 2 for k in range(16 * size)],) * 2} if conditions else {}
    data = SamplesDataModule(*samples(16 * size, dim), batch_size=size // processes, val_fraction=0.0, **labels)
    several = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if options.get("map"):
            options["map"] = ResidualMLP(dim, HIDDEN)
        model = MongeMap(None if conditions else dim, hidden=HIDDEN, **options)
        torch.manual_seed(1)  # where the map is made with the data, it is made alike
        quiet_trainer(max_steps=steps, callbacks=[Record(folder)], **several).fit(model, data)
        return torch.stack([torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)])


def large(size: int, dim: int) -> tuple[float, float, float]:
    """Return seconds of the processor and of the wall, and gigabytes beyond a process that has done a small step."""

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.process_time(), time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds = time.process_time() - self.start[0], time.perf_counter() - self.start[1]

    quiet()
    watch = Watch()
    small = DataLoader([UnpairedBatch(*samples(64, dim))], batch_size=None)  # type: ignore[arg-type, list-item]
    quiet_trainer(max_steps=1).fit(MongeMap(map=ResidualMLP(dim, HIDDEN)), small)
    idle = peak()
    loader = DataLoader([UnpairedBatch(*samples(size, dim))], batch_size=None)  # type: ignore[arg-type, list-item]
    quiet_trainer(max_steps=1, callbacks=[watch]).fit(MongeMap(map=ResidualMLP(dim, HIDDEN)), loader)
    return *watch.seconds, peak() - idle


def peak() -> float:
    """Return the largest resident memory of this process so far, in gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if platform.system() == "Darwin" else 1e6)


def in_new_process(call: Callable[..., Any], *args: Any) -> Any:
    """Return what a call returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, args)


def quiet() -> None:
    """Silence Lightning, and take one thread."""
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def sized(text: str) -> tuple[int, int]:
    """Parse SAMPLES:DIMENSION."""
    size, dim = text.split(":")
    return int(size), int(dim)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("step", "ddp", "large"))
    parser.add_argument("--batches", nargs="+", type=sized, help="SAMPLES:DIMENSION, global ones for ddp")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--parts", action="store_true", help="of the shell, in milliseconds a step")
    add_json(parser)
    args = parser.parse_args()
    quiet()
    rows: list[Row] = []
    say = partial(print, flush=True)
    if args.section == "step":
        say("| batch | d | under the Trainer | ms | plain loop, ms | ratio |\n|---|---|---|---|---|---|")
        for size, dim in args.batches or [(256, 2), (1024, 32)]:
            for name, bare in (("MongeMap", False), ("bare module", True)):
                mine, plain = zip(*step(size, dim, args.steps or 200, bare=bare), strict=True)
                times = {"ms": spread(mine, 1e3), "plain loop, ms": spread(plain, 1e3), "ratio": ratios(mine, plain)}
                rows.append({"batch": size, "d": dim, "under the Trainer": name, **times})
                mine, plain, ratio = (found["median"] for found in times.values())
                say(f"| {size} | {dim} | {name} | {mine:.2f} | {plain:.2f} | {ratio:.3f} |")
            if args.parts:
                for name, ms in sorted(parts(size, dim, args.steps or 200).items(), key=lambda part: -part[1]):
                    say(f"    {name:40}{ms:8.3f} ms")
    elif args.section == "ddp":
        say("| loss | batch | d | processes | steps | largest relative difference | last loss |")
        say("|---" * 7 + "|")
        for (size, dim), (title, options) in [(b, c) for b in args.batches or [(256, 8)] for c in CASES.items()]:
            one = losses(1, args.steps or 50, size, dim, **options)
            for processes in args.processes:
                several = losses(processes, args.steps or 50, size, dim, **options)
                worst = float(((several - one) / one).abs().max())
                row = title, size, dim, processes, one.shape[1], f"{worst:.1e}", f"{one[0, -1]:.3f}"
                named = ("loss", "batch", "d", "processes", "steps", "largest relative difference", "last loss")
                rows.append(dict(zip(named, row, strict=True)))
                say("| " + " | ".join(map(str, row)) + " |")
    else:
        say("| batch | d | solver | processor, s | wall, s | memory, GB |\n|---|---|---|---|---|---|")
        for size, dim in args.batches or [(4096, 2), (16384, 2), (16384, 32)]:
            processor, wall, memory = in_new_process(large, size, dim)
            solver = "dense" if size <= 4096 else "blocked"
            say(f"| {size} | {dim} | {solver} | {processor:.1f} | {wall:.1f} | {memory:.2f} |")
            where = {"batch": size, "d": dim, "solver": solver}
            rows.append({**where, "processor, s": processor, "wall, s": wall, "memory, GB": memory})
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
