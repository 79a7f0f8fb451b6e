"""``lightning-gap transport``: a trained map, applied to a file, or to a folder of files by many processes."""

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning_gap.commands.parsing import CommandError, at_least, positive

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to a parser."""
    transport = commands.add_parser(
        "transport",
        help="apply a trained map to a file of samples, or to a folder of files",
        description="Write the images of the samples in IN under the map of a checkpoint. Features of tables and "
        "AnnData are matched to the map's by name, and go by place where either has no names. Files are read and "
        "written block by block, in constant memory. OUT gets its name only when it is complete; in tables and AnnData "
        "all but the samples is kept as it is. Files in a folder IN are mapped to files of the same names in a "
        "folder OUT, each by one of as many processes as are started: by --devices, torchrun, srun, or this command "
        "again on any machine that shares the folders. What died is taken over, and a second run does what is missing.",
    )
    transport.add_argument(
        "checkpoint", type=Path, metavar="CKPT",
        help="checkpoint of a map that `fit` trained, or a folder of `MongeMap.save_pretrained`",
    )  # fmt: skip
    transport.add_argument(
        "source", type=Path, metavar="IN",
        help=".npy, .npz, .csv, .tsv, .parquet, .feather or .h5ad file of samples in rows; FILE::NAME names an array "
        "within an .npz file, FILE::obsm/NAME or FILE::layers/NAME within an .h5ad file; or a folder of such files",
    )  # fmt: skip
    transport.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help=".npy, .csv, .tsv, .parquet or .feather file, or .h5ad where IN is one; a folder where IN is a folder",
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
    transport.add_argument("--overwrite", action="store_true", help="replace OUT if it exists and is a file")
    many = transport.add_argument_group("a folder by many processes")
    many.add_argument(
        "--devices", metavar="N", type=at_least(1),
        help="processes on this node, each on its GPU where there are any (default: as torchrun or SLURM has it, or 1)",
    )  # fmt: skip
    many.add_argument(
        "--num-nodes", "--num_nodes", metavar="N", type=at_least(1),
        help="nodes, each of which runs this command with its NODE_RANK (default: as torchrun or SLURM has it, or 1)",
    )  # fmt: skip
    many.add_argument(
        "--stale-after", metavar="SECONDS", type=positive, default=60.0,
        help="silence after which a process on another machine counts as dead (default: 60)",
    )  # fmt: skip
    transport.set_defaults(run=_transport)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _transport(options: argparse.Namespace) -> None:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_gap.trainer.launch import launched

    try:
        place = launched(options.devices, options.num_nodes)
        if options.source.expanduser().is_dir():
            _map_folder(options, place)
            return
        if place.ranks > 1:
            raise CommandError(
                f"{options.source}: one file is mapped by one process, and there are {place.ranks}: give a folder of "
                "files, or start one process"
            )
        _map_file(options)
    except MisconfigurationException as error:
        raise CommandError(f"{options.checkpoint}: {error}") from None
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None


def _map_file(options: argparse.Namespace) -> None:
    from lightning_gap.monge.transport_files import load_map, transport_file

    device, start = _device(options.device), time.perf_counter()
    model = load_map(options.checkpoint, device=device)
    with _progress("rows") as progress:
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
    print(f"{rows} rows mapped to {options.output} in {time.perf_counter() - start:.1f} s")


def _map_folder(options: argparse.Namespace, place: Any) -> None:
    from lightning_gap.monge.transport_files import load_map
    from lightning_gap.monge.transport_folder import transport_folder

    if options.overwrite:
        raise CommandError("--overwrite is for one file: delete the folder OUT, or choose another")
    start = time.perf_counter()
    model = load_map(options.checkpoint, device=_device(options.device, place.local_rank))
    with _siblings(place, options.words) as failed, _progress("files", quiet=place.rank > 0) as progress:
        done = transport_folder(
            model,
            options.source,
            options.output,
            condition=options.condition,
            columns=options.columns,
            batch_size=options.batch_size,
            rank=place.rank,
            ranks=place.ranks,
            stale_after=options.stale_after,
            progress=progress,
        )
    took = f"in {time.perf_counter() - start:.1f} s"
    who = "" if place.ranks == 1 else f"process {place.rank} of {place.ranks}: "
    print(
        f"{who}{done.mapped} of {done.files} files, {done.rows} rows, mapped to {options.output} {took}; all are there"
    )
    if done.others and place.rank == 0:
        more = f", and {len(done.others) - 3} more" if len(done.others) > 3 else ""
        print(f"left out, as nothing that can be mapped: {', '.join(done.others[:3])}{more}", file=sys.stderr)
    for local_rank, status in failed.items():
        print(f"process {local_rank} ended with status {status}; others did its work", file=sys.stderr)


@contextmanager
def _siblings(place: Any, words: Sequence[str]) -> Iterator[dict[int, int]]:
    """Run the other processes of this node beside the block; yield what will hold the status of those that failed."""
    from lightning_gap.trainer.launch import environments_of_siblings

    command = [sys.executable, "-m", "lightning_gap", *words]
    processes: dict[int, subprocess.Popen[bytes]] = {}
    failed: dict[int, int] = {}
    with _ended_by_sigterm() if place.siblings else nullcontext():
        try:
            for rank, environment in environments_of_siblings(place).items():
                processes[rank] = subprocess.Popen(command, env=environment)
            yield failed
        except BaseException:
            for process in processes.values():
                process.terminate()
            raise
        finally:
            failed.update({rank: status for rank, process in processes.items() if (status := process.wait())})


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise SystemExit where the system would end this process, and what it has started would go on alone."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _device(name: str, local_rank: int = 0) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise CommandError(f"--device {name}: there is no such device here: use --device cpu") from None
    return device


@contextmanager
def _progress(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int | None], None] | None]:
    """Yield what moves a bar on a terminal's stderr, and nothing in a log file."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
