"""The command ``lightning-gap``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_gap import __version__

__all__ = ["main"]

# Epochs of the small-batch regime and the large batch, by data: what fits a few minutes, or half an hour.
_SIZES = {"mnist-5k": (10, 1024), "fashion-mnist": (5, 2048)}
_SMALL_BATCH = 128


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: give at least {least}")
        return value

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-gap", description="Close two gaps with PyTorch Lightning: large-batch training, and Monge maps."
    )
    parser.add_argument("--version", action="version", version=f"lightning-gap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    demo.add_argument("--seeds", type=_at_least(1), default=2, metavar="N", help="runs of each recipe")
    demo.add_argument(
        "--epochs", type=_at_least(5), metavar="N", default=argparse.SUPPRESS,
        help="epochs of the small-batch regime (default: 10; 5 for fashion-mnist)",
    )  # fmt: skip
    demo.add_argument(
        "--large-batch", type=_at_least(2 * _SMALL_BATCH), metavar="N", default=argparse.SUPPRESS,
        help="the large batch (default: 1024; 2048 for fashion-mnist)",
    )  # fmt: skip
    demo.add_argument("--iterations", type=_at_least(1), default=500, metavar="N", help="steps of each colour map")
    demo.set_defaults(run=_demo)
    return parser


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
        raise SystemExit(_fail(str(error))) from None


def _fail(message: str) -> int:
    print(f"lightning-gap: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lightning-gap``.

    Args:
        arguments: The words after the command's name; those of the process by default.

    Raises:
        SystemExit: With status 2 and one line on stderr if the user asked for something that cannot be done.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("lightning-gap: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
