"""The critical batch along a training, by branches from its checkpoints, beside the gradient noise scale there.

A network of 32 units on scikit-learn's digits, plain SGD, batch 8, trained for 0, 1600, 8000 and 32,000 samples. Two
minutes on one core.

python -m benchmarks.science.large_batch.critical_branches            # train, write the log and the page's table
python -m benchmarks.science.large_batch.critical_branches --logged   # write the page's table from the log
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.logs import RESULTS, append, read
from benchmarks.marked import table, write
from benchmarks.science.large_batch.steps_to_target import PAGE, Digits
from lightning_gap import GradientNoiseScale
from lightning_gap.regime import measure_critical_batch
from lightning_gap.trainer.terminal import quiet

LOG = "critical_branches.jsonl"
BATCH, RATE, SAMPLES, TOLERANCE = 8, 0.25, 4096, 0.01
SEEN, MULTIPLES, SEEDS = (0, 1600, 8000, 32_000), (1, 2, 4, 8, 16, 32), (0, 1, 2)
SILENT: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": -1,
}  # fmt: skip


class Classifier(LightningModule):
    """A network of 32 units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def measure(log: Path) -> None:
    """Train to each checkpoint, measure there, and write a row for each."""
    digits = Digits((0,))
    data = DataLoader(TensorDataset(digits.images, digits.labels), BATCH, shuffle=True, drop_last=True)
    log.unlink(missing_ok=True)
    for seen in SEEN:
        seed_everything(0, verbose=False)
        # The noise scale needs two batch sizes: the batch 8 as two of 4.
        model, noise = Classifier(), GradientNoiseScale(every_n_updates=1)
        halves = DataLoader(data.dataset, BATCH // 2, shuffle=True, drop_last=True)
        with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*learns nothing would pass")  # the table says it
            path = None
            if seen:
                trainer = Trainer(max_steps=seen // BATCH, accumulate_grad_batches=2, callbacks=[noise], **SILENT)
                trainer.fit(model, halves)
                path = f"{folder}/here.ckpt"
                trainer.save_checkpoint(path)
            branches = measure_critical_batch(
                model, data, ckpt_path=path, samples=SAMPLES, multiples=MULTIPLES, seeds=SEEDS, tolerance=TOLERANCE,
                accelerator="cpu",
            )  # fmt: skip
        row = {
            "seen": seen, "noise_scale": round(noise.estimate.critical_batch_size) if seen else None,
            "critical_batch": branches.critical_batch, "interval": branches.interval,
            "progress": round(branches.progress, 4),
            "worse": {k: round(float(branches.differences(k).mean()), 4) for k in MULTIPLES},
        }  # fmt: skip
        append(log, row)


def block(logs: Path) -> str:
    """Return the page's table."""
    largest = str(BATCH * MULTIPLES[-1])
    rows = []
    for row in read(logs / LOG):
        low, high = row["interval"]
        names = [f"at least {size}" if str(size) == largest else str(size) for size in (row["critical_batch"], high)]
        worse = [f"{value:+.3f}" for k, value in row["worse"].items() if k != "1"]
        rows.append([row["seen"], row["noise_scale"] or "–", names[0], f"{low} to {names[1]}", row["progress"], *worse])
    titles = ["samples seen", "noise scale so far", "critical batch", "95 %", "gain at κ = 1"]
    return table([*titles, *(f"worse by at {BATCH * k}" for k in MULTIPLES[1:])], rows)


def main() -> None:
    """Measure, or read the log, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=RESULTS)
    parser.add_argument("--logged", action="store_true", help="do not train")
    options = parser.parse_args()
    if not options.logged:
        torch.set_num_threads(1)
        measure(options.logs / LOG)
    write(PAGE, {"branches": block(options.logs)})
    print(block(options.logs))


if __name__ == "__main__":
    main()
