"""Every scheduler of torch under LargeBatchRegime against a real run at the reference batch, update by update.

Prints the largest relative error of the learning rate over all updates, and the difference in their number.

Run: python benchmarks/regime_schedules.py
"""

import contextlib
import io
import logging
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from lightning_gap import LargeBatchRegime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "regime"))
from regime_runs import SCHEDULES, Regression, loader, run

SAMPLES, REFERENCE, EPOCHS, RATIOS = 72, 2, 6, (2, 3, 7.5, 16, 32)
UNIT = SAMPLES // REFERENCE


def rates(name: str, interval: str, batch: int, *callbacks: LargeBatchRegime) -> torch.Tensor:
    schedule = partial(SCHEDULES[name], unit=1 if interval == "epoch" else UNIT)
    with contextlib.redirect_stdout(io.StringIO()):
        module = Regression(schedule, interval=interval)
        _, trace = run(module, loader(batch, SAMPLES), *callbacks, max_epochs=EPOCHS)
    return trace.tensor


def main() -> None:
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    print(f"{'scheduler':28} {'every':6}", *(f"{f'x {ratio:g}':>8}" for ratio in RATIOS), "  updates missed")
    for name in SCHEDULES:
        for interval in ("epoch", "step"):
            reference, errors, missed = rates(name, interval, REFERENCE), [], set()
            for ratio in RATIOS:
                ours = rates(name, interval, int(REFERENCE * ratio), LargeBatchRegime(REFERENCE))
                missed.add(len(ours) - len(reference))
                errors.append((ours / (math.sqrt(ratio) * reference) - 1).abs().max().item())
            print(f"{name:28} {interval:6}", *(f"{error:8.0e}" for error in errors), f"  {missed}", flush=True)


if __name__ == "__main__":
    main()
