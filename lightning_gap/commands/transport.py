"""``lightning-gap transport``: a trained map, applied to a file."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_gap.commands.parsing import CommandError, at_least

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to a parser."""
    transport = commands.add_parser(
        "transport",
        help="apply a trained map to a file of samples",
        description="Write the images of the samples in IN under the map of a checkpoint. Features of tables and "
        "AnnData are matched to the map's by name, and go by place where either has no names. Files are read and "
        "written block by block, in constant memory. OUT gets its name only when it is complete; in tables and AnnData "
        "all but the samples is kept as it is.",
    )
    transport.add_argument(
        "checkpoint", type=Path, metavar="CKPT",
        help="checkpoint of a map that `fit` trained, or a folder of `MongeMap.save_pretrained`",
    )  # fmt: skip
    transport.add_argument(
        "source", type=Path, metavar="IN",
        help=".npy, .npz, .csv, .tsv, .parquet, .feather or .h5ad file of samples in rows; FILE::NAME names an array "
        "within an .npz file, FILE::obsm/NAME or FILE::layers/NAME within an .h5ad file",
    )  # fmt: skip
    transport.add_argument(
        "output", type=Path, metavar="OUT", help=".npy, .csv, .tsv, .parquet or .feather file, or .h5ad where IN is one"
    )
    transport.add_argument(
        "--condition", metavar="NAME",
        help="of a conditional map: the condition of all samples, or the column of IN with each one's; for vectors, "
        "numbers with commas between, or columns; for a map of drugs and doses, 'A, 10' or 'drug,dose'",
    )  # fmt: skip
    transport.add_argument(
        "--columns", metavar="A,B,...", type=_names,
        help="columns of IN with the features (default: those of the map, or all of numbers if it has no names)",
    )  # fmt: skip
    transport.add_argument(
        "--batch-size", metavar="N", type=at_least(1), default=8192,
        help="rows that go through the network at once (default: 8192)",
    )  # fmt: skip
    transport.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: auto, a GPU where there is one)"
    )
    transport.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    transport.set_defaults(run=_transport)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _transport(options: argparse.Namespace) -> None:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_gap.monge.transport_files import load_map, transport_file

    device = _device(options.device)
    start = time.perf_counter()
    try:
        model = load_map(options.checkpoint, device=device)
        with _progress() as progress:
            rows = transport_file(
                model,
                options.source,
                options.output,
                condition=options.condition,
                columns=options.columns,
                batch_size=options.batch_size,
                overwrite=options.overwrite,
                progress=progress,
            )
    except MisconfigurationException as error:
        raise CommandError(f"{options.checkpoint}: {error}") from None
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None
    print(f"{rows} rows mapped to {options.output} in {time.perf_counter() - start:.1f} s")


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise CommandError(f"--device {name}: there is no such device here: use --device cpu") from None
    return device


@contextmanager
def _progress() -> Iterator[Callable[[int, int | None], None] | None]:
    """Yield what moves a bar on a terminal's stderr, and nothing in a log file."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
