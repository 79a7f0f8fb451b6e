"""``lightning-gap demo``: both halves on real data."""

import argparse
import os
from pathlib import Path
from typing import Any

from lightning_gap.commands.parsing import CommandError, at_least

__all__ = ["add"]

# Epochs of the small-batch regime and the large batch, by data: what fits a few minutes, or half an hour.
_SIZES = {"mnist-5k": (10, 1024), "fashion-mnist": (5, 2048)}
_SMALL_BATCH = 128


def add(commands: Any) -> None:
    """Add the command to a parser."""
    demo = commands.add_parser(
        "demo",
        help="run both halves on real data and write a report",
        description="Train a network with small and large batches and learn colour maps between two photographs; "
        "write report.html, results.json and the pictures. About four minutes on two CPU cores with the defaults.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--data", choices=list(_SIZES), default="mnist-5k",
        help="images of the large-batch half; fashion-mnist needs Debian's dataset-fashion-mnist and half an hour",
    )  # fmt: skip
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write to")
    demo.add_argument("--seeds", type=at_least(1), default=2, metavar="N", help="runs of each recipe")
    demo.add_argument(
        "--epochs", type=at_least(5), metavar="N", default=argparse.SUPPRESS,
        help="epochs of the small-batch regime (default: 10; 5 for fashion-mnist)",
    )  # fmt: skip
    demo.add_argument(
        "--large-batch", type=at_least(2 * _SMALL_BATCH), metavar="N", default=argparse.SUPPRESS,
        help="the large batch (default: 1024; 2048 for fashion-mnist)",
    )  # fmt: skip
    demo.add_argument("--iterations", type=at_least(1), default=500, metavar="N", help="steps of each colour map")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    # Spinning OpenMP threads stall every operation when another process runs on the same cores; read at torch's import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and Lightning take seconds to import: only here.
    from lightning_gap.demo import ColourSettings, DemoError, DemoSettings, LargeBatchSettings, run_demo

    epochs, large_batch = _SIZES[options.data]
    settings = DemoSettings(
        data=options.data,
        output=options.output,
        large_batch=LargeBatchSettings(
            epochs=getattr(options, "epochs", epochs),
            small_batch=_SMALL_BATCH,
            large_batch=getattr(options, "large_batch", large_batch),
            seeds=tuple(range(options.seeds)),
        ),
        colours=ColourSettings(iterations=options.iterations),
    )
    try:
        run_demo(settings)
    except DemoError as error:
        raise CommandError(str(error)) from None
