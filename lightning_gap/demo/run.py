"""Run both halves of the demo with progress bars, print their tables, and write report, pictures and numbers."""

import io
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_gap import __version__
from lightning_gap.dashboards import render_html
from lightning_gap.demo.colour_transfer import ColourSettings, ColourTransfer, transfer_colours
from lightning_gap.demo.datasets import DemoError, load_images, photographs
from lightning_gap.demo.large_batch import LargeBatchSettings, images_to_pass, train_all
from lightning_gap.demo.report import DemoResults, tell
from lightning_gap.demo.tables import accuracy_table, colour_table
from lightning_gap.trainer.terminal import quiet

__all__ = ["DemoSettings", "run_demo"]

_DIRECTIONS = (("china", "flower"), ("flower", "china"))


@dataclass(frozen=True)
class DemoSettings:
    """What to run.

    Args:
        data: ``"mnist-5k"`` or ``"fashion-mnist"``.
        output: Folder for the report, the pictures and the numbers; made if missing.
        large_batch: Configuration of the large-batch half.
        colours: Configuration of the transport half.
    """

    data: str = "mnist-5k"
    output: Path = Path("demo_output")
    large_batch: LargeBatchSettings = field(default_factory=LargeBatchSettings)
    colours: ColourSettings = field(default_factory=ColourSettings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notices and the callbacks' own tables off the screen while many short fits run."""
    with quiet(logging.ERROR), redirect_stdout(io.StringIO()):
        yield


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=total, title=title)
        yield lambda what, amount: bar.update(task, advance=amount, description=what)
        bar.update(task, completed=total, description="done")


def _require_extras() -> None:
    """Fail before minutes of training rather than after them."""
    for module in ("matplotlib", "mlxtend", "sklearn", "PIL"):
        try:
            __import__(module)
        except ImportError as error:
            raise DemoError(f"the demo needs {module}: pip install 'lightning_gap[data,plots]'") from error


def _prepare(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.html").touch()
    except OSError as error:
        raise DemoError(f"cannot write to --output {output}: {error.strerror}; choose another folder") from error


def run_demo(settings: DemoSettings, console: Console | None = None) -> Path:
    """Run the demo and return the path of its report.

    Args:
        settings: What to run.
        console: Where tables and bars go; the terminal by default.

    Raises:
        DemoError: If data or an optional package is missing, or the output folder cannot be written.
    """
    console = console or Console(file=sys.stdout)
    started = time.perf_counter()
    _require_extras()
    images = load_images(settings.data)
    count, batch = len(images.train[0]), settings.large_batch.large_batch
    if batch > count:
        raise DemoError(f"--large-batch {batch} is more than the {count} training images: choose a smaller one")
    _prepare(settings.output)
    pictures = photographs()

    total = images_to_pass(settings.large_batch, count)
    with _progress(console, "Large batch", total) as progress, _quiet():
        runs = train_all(images, settings.large_batch, progress)
    plan = next(run.plan for several in runs.values() for run in several if run.plan is not None)
    console.print(plan.table())
    console.print(accuracy_table(images.name, runs, settings.large_batch).to_rich())

    colours = settings.colours
    steps = len(_DIRECTIONS) * len(colours.gap_weights) * colours.iterations
    with _progress(console, "Monge map  ", steps) as progress, _quiet():
        transfers = [transfer_colours(pictures, *direction, colours, progress) for direction in _DIRECTIONS]
    for transfer in transfers:
        console.print(colour_table(transfer, colours.epsilon, colours.held_out).to_rich())

    seconds = time.perf_counter() - started
    results = DemoResults(
        images.name, runs, settings.large_batch, transfers, pictures, _configuration(settings, seconds)
    )
    report = _write(results, settings)
    console.print(f"{seconds:.0f} seconds. Numbers: {settings.output / 'results.json'}", highlight=False)
    console.print(f"[bold]Open {report}[/]", soft_wrap=True, highlight=False)
    return report


def _configuration(settings: DemoSettings, seconds: float) -> dict[str, dict[str, Any]]:
    packages = ("torch", "lightning", "geomloss", "numpy")
    return {
        "Large batch": {
            "data": settings.data,
            **asdict(settings.large_batch),
            "optimizer": "SGD, momentum 0.9, weight decay 1e-4, learning rate 0.1, / 10 at 20, 40, 60 % of the epochs",
        },
        "Monge map": asdict(settings.colours) | {"optimizer": "Adam", "network": "residual MLP 3-128-128-128-3"},
        "Machine and versions": {
            "lightning_gap": __version__,
            **{name: version(name) for name in packages},
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "seconds in all": round(seconds, 1),
        },
    }


def _write(results: DemoResults, settings: DemoSettings) -> Path:
    from PIL import Image

    for transfer in results.transfers:
        for weight, picture in transfer.pictures.items():
            name = f"{transfer.source}_to_{transfer.target}_{'with' if weight else 'without'}_gap.png"
            Image.fromarray(picture).save(settings.output / name, optimize=True)
    page = render_html(tell(results, epsilon=settings.colours.epsilon, held_out=settings.colours.held_out))
    (settings.output / "report.html").write_text(page, encoding="utf-8")
    numbers = {
        "configuration": results.configuration,
        "large_batch": {
            name: [asdict(run) | {"plan": run.plan and run.plan.to_dict()} for run in several]
            for name, several in results.runs.items()
        },
        "colour_transfer": [_transfer_facts(transfer) for transfer in results.transfers],
    }
    text = json.dumps(_plain(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    (settings.output / "results.json").write_text(text + "\n", encoding="utf-8")
    return settings.output / "report.html"


def _transfer_facts(transfer: ColourTransfer) -> dict[str, Any]:
    maps = [
        {"gap_weight": weight, **asdict(score), "seconds": transfer.seconds[weight]}
        for weight, score in transfer.scores.items()
    ]
    return {
        "source": transfer.source,
        "target": transfer.target,
        "before": asdict(transfer.before),
        "divergence_of_two_target_samples": transfer.floor,
        "maps": maps,
    }


def _plain(value: Any) -> Any:
    """Return the value as JSON knows it; NaN and infinity, which it does not, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
