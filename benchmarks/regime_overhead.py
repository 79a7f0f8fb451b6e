"""What LargeBatchRegime and GradientNoiseScale cost beside an update of ResNet-18 on CIFAR-10-sized images.

Both callbacks run in the training whose updates are timed, so each update gives a pair: the seconds inside their hooks,
and the seconds of the whole update. A second table has the same hooks beside the smallest of models, in turns with and
without them, so that nothing hides in the noise of a large update.

    python benchmarks/regime_overhead.py [--updates 8] [--turns 3]
"""

import argparse
import contextlib
import io
import logging
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measurements import Row, add_json, spread, write_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GradientNoiseScale, LargeBatchRegime


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
    """A network under cross entropy and SGD."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return SGD with a scheduler."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 30)]


class Stopwatch(Callback):
    """The seconds of every update, from the start of its first batch to the start of the next's."""

    def __init__(self, accumulate: int) -> None:
        self.starts: list[float] = []
        self.accumulate = accumulate

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time at the first batch of an update."""
        if batch_idx % self.accumulate == 0:
            self.starts.append(time.perf_counter())

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


def trainer_of(callbacks: list[Callback], updates: int, accumulate: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=updates,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
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


def beside_nothing(updates: int, turns: int) -> list[Row]:
    """The whole cost of a callback, Lightning's calls of its hooks included, with a model that costs next to none."""
    rows: list[Row] = []
    print("A linear model, interleaved pairs, µs: without, with, difference")
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(10, (16,))), batch_size=16)
    for name, (make, accumulate) in CASES.items():
        if accumulate > 1:
            continue
        medians: tuple[list[float], list[float]] = ([], [])
        for _ in range(turns):
            for seconds, extra in zip(medians, ([], [make()]), strict=True):
                watch = Stopwatch(1)
                with contextlib.redirect_stdout(io.StringIO()):
                    trainer_of([watch, *extra], updates).fit(Classifier(nn.Linear(4, 10)), data)
                seconds.append(statistics.median(watch.updates))
        without, with_ = (1e6 * statistics.median(seconds) for seconds in medians)
        difference = 1e6 * statistics.median(b - a for a, b in zip(*medians, strict=True))
        print(f"{name:34}{without:8.0f}{with_:8.0f}{difference:8.0f}", flush=True)
        spreads = {
            "without, µs": spread(medians[0], 1e6),
            "with, µs": spread(medians[1], 1e6),
            "difference, µs": spread([b - a for a, b in zip(*medians, strict=True)], 1e6),
        }
        rows.append({"table": "A linear model, an update", "callback": name, **spreads})
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
    rows = beside_nothing(updates=60, turns=options.turns)
    rows += beside_resnet(batch=32, updates=options.updates)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
