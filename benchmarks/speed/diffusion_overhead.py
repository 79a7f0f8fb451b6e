"""What ``UltraSlowDiffusion`` adds to 10,000 updates of ResNet-18: its time, and its memory.

    python -m benchmarks.speed.diffusion_overhead [--batch-size 32] [--steps 12] [--updates 10000]

Where 10,000 updates take hours, their time is put together from parts that are measured in one run: a training step,
a measurement, and the callback's hooks where no measurement is due. All three are medians; points that are due in
10,000 updates are counted on the grid; the forecast of a run with a reference and the end of the run are timed apart.
The memory is that of the tensors the callback holds.
"""

import argparse
import time
from statistics import median

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.measurements import add_json, spread, write_rows
from lightning_gap import UltraSlowDiffusion
from lightning_gap.diffusion import fit_diffusion, forecast_updates, next_log_update


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or into != out:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet18(LightningModule):
    """ResNet-18 for images of 3 × 32 × 32 and ten classes: 11.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        blocks = [b for into, out, stride in widths for b in (Block(into, out, stride), Block(out, out, 1))]
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the usual optimizer."""
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Images(Dataset[tuple[Tensor, int]]):
    """Random images, the same at each visit."""

    def __init__(self, count: int) -> None:
        self.images = torch.randn(count, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 10


class Clock(Callback):
    """When each batch started."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        """Note the time."""
        self.starts.append(time.perf_counter())


class Timed(UltraSlowDiffusion):
    """The callback, with the time spent in each of its calls after a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.recording: list[float] = []
        self.waiting: list[float] = []

    def on_train_batch_end(self, *args: object) -> None:
        """Time the hook."""
        points, start = len(self._trace), time.perf_counter()
        super().on_train_batch_end(*args)
        spent = time.perf_counter() - start
        (self.recording if len(self._trace) > points else self.waiting).append(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="steps that are run and timed")
    parser.add_argument("--updates", type=int, default=10_000, help="the run whose time is put together")
    add_json(parser)
    options = parser.parse_args()
    console = Console()

    torch.manual_seed(0)
    clock, diffusion = Clock(), Timed()
    trainer = Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=[clock, diffusion],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = ResNet18()
    trainer.fit(model, DataLoader(Images(options.batch_size * 4), options.batch_size))
    updates = [b - a for a, b in zip(clock.starts[1:], clock.starts[2:], strict=False)]
    step = median(updates) - median(diffusion.recording)
    record, wait = median(diffusion.recording), median(diffusion.waiting or [0.0])

    grid = [next_log_update(0, diffusion.points_per_decade)]
    while (due := next_log_update(grid[-1], diffusion.points_per_decade)) <= options.updates:
        grid.append(due)
    curve = [1 + torch.tensor(float(t)).log().item() for t in grid]
    noisy = [d + 0.01 * torch.randn(()).item() for d in curve]
    parts = []
    for call in (
        lambda: forecast_updates(grid, noisy, 2 * curve[-1], resamples=199),
        lambda: fit_diffusion(grid, noisy),
    ):
        start = time.perf_counter()
        call()
        parts.append(time.perf_counter() - start)
    forecast, fit = parts

    whole = options.updates * step
    added = len(grid) * record + (options.updates - len(grid)) * wait + fit
    console.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {torch.get_num_threads()} threads"
    )
    console.print(
        f"a step at batch {options.batch_size}: {1e3 * step:.0f} ms; {options.updates} of them: {whole / 60:.0f} min"
    )
    console.print(f"a measurement, recorded and logged: {1e3 * record:.2f} ms; {len(grid)} points are due")
    console.print(f"the hooks where none is due: {1e6 * wait:.1f} µs")
    console.print(
        f"the fit at the end: {1e3 * fit:.0f} ms; a forecast at a point, with a reference: {1e3 * forecast:.0f} ms"
    )
    console.print(f"added to {options.updates} updates: {100 * added / whole:.4f} % of their time")
    with_reference = added + len(grid) * forecast
    console.print(f"with a reference: {100 * with_reference / whole:.4f} %")
    assert diffusion._anchor is not None
    held = sum(tensor.nbytes for tensor in diffusion._anchor.weights.values())
    weights = sum(p.nbytes for p in model.parameters())
    console.print(f"memory held: {held / weights:.4f} copies of the parameters")
    parts_found = {
        f"a step of training, batch {options.batch_size}": (updates, 1e3, "ms"),
        "a measurement, recorded and logged": (diffusion.recording, 1e3, "ms"),
        "the hooks where none is due": (diffusion.waiting or [0.0], 1e6, "µs"),
        "a forecast at a point, with a reference": ([forecast], 1e3, "ms"),
        "the fit at the end": ([fit], 1e3, "ms"),
    }
    rows = [
        {"table": "Parts", "part": name, "time": spread(times, scale), "unit": unit}
        for name, (times, scale, unit) in parts_found.items()
    ]
    # The share at the quartiles of the step, which is nearly all of the time and of its spread.
    whole_spread = [options.updates * seconds for seconds in updates]
    title = f"{options.updates:,} updates"
    for name, extra in (("without a reference", added), ("with a reference", with_reference)):
        share = spread([100 * extra / seconds for seconds in whole_spread])
        rows.append({"table": title, "callback": name, "added, %": share, "copies of the weights held": held / weights})
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
