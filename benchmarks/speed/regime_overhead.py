"""What LargeBatchRegime and GradientNoiseScale cost beside an update of ResNet-18 on CIFAR-10-sized images.

Both callbacks run in the training whose updates are timed, so each update gives a pair: the seconds inside their hooks,
and the seconds of the whole update. A second table has all that the regime adds to the smallest of models, in turns
with and without it, in seconds of the processor: Lightning's calls of its hooks, loggers and schedulers included.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.regime_overhead [--updates 8] [--turns 3]

On an emulated device (g++ is needed) it counts what the regime adds there instead: waits of the host and launches.

    EMULATED_DEVICE=1 python -m benchmarks.speed.regime_overhead
"""

# ruff: noqa: E402 - the emulated device must be there before torch is imported

import argparse
import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EMULATED = os.environ.get("EMULATED_DEVICE", "0") not in ("", "0")
if EMULATED:
    sys.path.insert(0, str(ROOT / "tests" / "device"))
    import emulation

    emulation.load(ROOT / ".pytest_cache" / "emulated_device")  # before torch is imported
    emulation.install()

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measurements import Row, add_json, spread, write_rows
from lightning_gap import BatchSizeSchedule, GradientNoiseScale, LargeBatchRegime


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions to the shortcut."""
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """The ResNet-18 for images of 32 x 32: 11.2 million weights."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(before, after, 1 if before == after else 2) for before, after in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Classifier(LightningModule):
    """A network under cross entropy and SGD, with a scheduler of epochs, or of updates."""

    def __init__(self, net: nn.Module, *, by_updates: bool = False) -> None:
        super().__init__()
        self.net, self.by_updates = net, by_updates

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return SGD with a scheduler."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.by_updates:
            scheduler = {"scheduler": CosineAnnealingLR(optimizer, 10_000), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        return [optimizer], [StepLR(optimizer, 30)]


class Stopwatch(Callback):
    """The seconds of every update, from the start of its first batch to the start of the next's."""

    def __init__(self, accumulate: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.starts: list[float] = []
        self.accumulate, self.clock = accumulate, clock

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time at the first batch of an update."""
        if batch_idx % self.accumulate == 0:
            self.starts.append(self.clock())

    @property
    def updates(self) -> list[float]:
        """The seconds of every update but the last."""
        return [after - before for before, after in pairwise(self.starts)]


def time_hooks(callback: Callback, spent: dict[int, float], trainer: Callable[[], Trainer]) -> None:
    """Wrap what a callback does in an update, so that it notes the seconds by update."""

    def timed(hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        update, start = trainer().global_step, time.perf_counter()
        hook(*args, **kwargs)
        # on_train_batch_end belongs to the update just made.
        spent[update - (hook.__name__ == "on_train_batch_end")] += time.perf_counter() - start

    names = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "_hear")
    for name in (*names, "on_before_backward"):
        if name in dir(type(callback)):
            setattr(callback, name, partial(timed, getattr(callback, name)))


def trainer_of(callbacks: list[Callback], updates: int, accumulate: int = 1, **options: Any) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="gpu" if EMULATED else "cpu",
        devices=1,
        max_epochs=-1,
        max_steps=updates,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        **{"logger": False, **quiet, **options},
    )


def images(batch: int, batches: int) -> DataLoader[Any]:
    count = batch * batches
    return DataLoader(TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,))), batch_size=batch)


REGIME = partial(LargeBatchRegime, 8)
CASES: dict[str, tuple[Callable[[], Callback], int]] = {
    "LargeBatchRegime": (REGIME, 1),
    "… with warm-up": (lambda: REGIME(warmup_updates=1000), 1),
    "… with clipping": (lambda: REGIME(clip_norm=5.0), 1),
    "GradientNoiseScale, every update": (lambda: GradientNoiseScale(every_n_updates=1), 2),
    "GradientNoiseScale, every 10th": (lambda: GradientNoiseScale(every_n_updates=10), 2),
}


def beside_resnet(batch: int, updates: int) -> list[Row]:
    rows: list[Row] = []
    print(f"ResNet-18, batch {batch}: {'update, ms':>15} {'hooks, ms':>12} {'share, %':>10}")
    for name, (make, accumulate) in CASES.items():
        torch.manual_seed(0)
        callback, spent, watch = make(), defaultdict[int, float](float), Stopwatch(accumulate)
        trainer = trainer_of([watch, callback], updates, accumulate)
        time_hooks(callback, spent, lambda trainer=trainer: trainer)  # type: ignore[misc]
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(Classifier(resnet18()), images(batch // accumulate, updates * accumulate))
        pairs = [(seconds, spent[update]) for update, seconds in enumerate(watch.updates)][1:]
        total, inside = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        if name.endswith("10th"):  # most updates are not measured, so here the mean
            inside = statistics.mean(pair[1] for pair in pairs)
        print(f"{name:34}{1e3 * total:6.0f}{1e3 * inside:12.2f}{100 * inside / total:12.3f}", flush=True)
        times, hooks = zip(*pairs, strict=True)
        if name.endswith("10th"):
            row = {"hooks, ms": 1e3 * inside, "share, %": 100 * inside / total}
        else:
            row = {"hooks, ms": spread(hooks, 1e3), "share, %": spread([100 * b / a for a, b in pairs])}
        rows.append({"table": f"ResNet-18, batch {batch}", "callback": name, "update, ms": spread(times, 1e3), **row})
    return rows


REGIMES: dict[str, tuple[Callable[[], Callback], bool]] = {
    "LargeBatchRegime": (REGIME, False),
    "… with warm-up": (CASES["… with warm-up"][0], False),
    "… with clipping": (CASES["… with clipping"][0], False),
    "… with a scheduler of updates": (REGIME, True),
    "… with all three": (partial(REGIME, warmup_updates=1000, clip_norm=5.0), True),
    "BatchSizeSchedule": (partial(BatchSizeSchedule, [(0, 16)], reference_batch_size=8), False),
    "BatchSizeSchedule, scheduler of updates": (partial(BatchSizeSchedule, [(0, 16)], reference_batch_size=8), True),
}
LOGGERS: dict[str, int | None] = {"none": None, "CSV, every 50": 50, "CSV, every 1": 1}


def fit_linear(callbacks: list[Callback], updates: int, every: int | None, *, by_updates: bool) -> None:
    """Train a linear model with 50 batches an epoch, which costs next to nothing."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(800, 4), torch.randint(10, (800,))), batch_size=16)
    module = Classifier(nn.Linear(4, 10), by_updates=by_updates)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        logger = CSVLogger(folder) if every else False
        trainer_of(callbacks, updates, logger=logger, log_every_n_steps=every).fit(module, data)


def beside_nothing(updates: int, turns: int) -> list[Row]:
    """All that the regime adds to an update, by interleaved pairs of runs; means, for some updates are logged."""
    rows: list[Row] = []
    print("A linear model, an update, interleaved pairs, ms: without, with, difference")
    for logger, every in LOGGERS.items():
        for name, (make, by_updates) in REGIMES.items():
            means: tuple[list[float], list[float]] = ([], [])
            for _ in range(turns):
                for seconds, extra in zip(means, ([], [make()]), strict=True):
                    watch = Stopwatch(1, time.thread_time)  # of the processor: other processes do not count
                    fit_linear([watch, *extra], updates, every, by_updates=by_updates)
                    seconds.append(statistics.mean(watch.updates[10:]))
            difference = spread([b - a for a, b in zip(*means, strict=True)], 1e3)
            without, with_ = (spread(seconds, 1e3) for seconds in means)
            medians = "".join(f"{found['median']:8.3f}" for found in (without, with_, difference))
            print(f"{name:40}{logger:14}{medians}", flush=True)
            times = {"without, ms": without, "with, ms": with_, "difference, ms": difference}
            rows.append({"table": "A linear model, an update", "callback": name, "logger": logger, **times})
    return rows


class Counted(Callback):
    """What some updates cost a device, from the start of one to the start of another, loggers included."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.scope = first, last, contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to count, or end."""
        from counts import counting

        if trainer.global_step == self.first:
            self.counts = self.scope.enter_context(counting())
        elif trainer.global_step == self.last:
            self.scope.close()


def on_a_device() -> list[Row]:
    """What the regime adds to an update on an emulated device: waits of the host, and launches."""
    rows: list[Row] = []
    print("An emulated device, added to an update: waits of the host, launches")
    for logger, every in LOGGERS.items():
        for name, (make, by_updates) in REGIMES.items():
            found = []
            for extra in ([], [make()]):
                counted = Counted(10, 60)  # 50 updates, one of them logged, or all
                fit_linear([counted, *extra], 61, every, by_updates=by_updates)
                found.append(counted.counts)
            before, after = ([counts.syncs.total(), counts.launches.total()] for counts in found)
            waits, launches = ((b - a) / 50 for a, b in zip(before, after, strict=True))
            print(f"{name:34}{logger:14}{waits:8.2f}{launches:8.2f}", flush=True)
            row = {"callback": name, "logger": logger, "waits": waits, "launches": launches}
            rows.append({"table": "An emulated device, added to an update", **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8, help="of ResNet-18")
    parser.add_argument("--turns", type=int, default=3, help="with and without, beside the linear model")
    add_json(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    print(f"{torch.get_num_threads()} threads")
    if EMULATED:
        rows = on_a_device()
    else:
        rows = beside_nothing(updates=300, turns=options.turns)
        rows += beside_resnet(batch=32, updates=options.updates)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
