"""Ghost batch normalization against plain BatchNorm and against the ways peers do it: time and memory, as ratios.

    python -m benchmarks.speed.ghost_batch_norm op [--threads 1 2] [--repeat 9] [--device cpu|cuda] [--dtype float32]
    python -m benchmarks.speed.ghost_batch_norm step | compile | memory | convert | limit

``op``: one layer, forward and backward with a given upstream gradient. ``step``: a whole training step of a CNN with
six convolutions and of an MLP with four normalized layers. ``compile``: the layer under ``torch.compile``, against
compiled BatchNorm. ``memory``: the highest resident memory of one forward and backward pass, beyond what was there.
``convert``: a ResNet-50. ``limit``: the passes over memory that contiguous ghosts cannot do without by torch's kernels,
each one call of the fastest, with nothing around them.

All that are compared run in turns; a ratio is the median over the turns. With one CPU thread the clock is the process's
CPU time, which other processes on the machine disturb less; else it is the wall clock, with a GPU synchronized. With
``--reuse-memory`` the C library keeps freed memory, as the allocator of a GPU does; without it each large tensor is
paid for in page faults, by all alike.

The designs of peers: ``chunks`` runs BatchNorm on each chunk and concatenates (Composer, tabnet); ``tabnet`` is
that of an installed pytorch-tabnet (``pip install --no-deps pytorch-tabnet``), for 2-d input; ``splits`` is one call
on a view with strided ghosts, and no sequential running statistics (cifar10-fast, which takes only NCHW).
"""

import argparse
import copy
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from benchmarks.speed.ghost_rivals import Chunks, bare_image_passes, bare_passes, rivals, tensors
from lightning_gap import convert_ghost_batchnorm

IMAGES = [((512, 64, 32, 32), "NCHW"), ((512, 64, 32, 32), "channels_last")]
IMAGES += [((1024, 128, 16, 16), "NCHW"), ((1024, 128, 16, 16), "channels_last")]
RESNET50 = [((256, 64, 112, 112), "channels_last"), ((256, 256, 56, 56), "channels_last")]
RESNET50 += [((256, 512, 28, 28), "channels_last"), ((256, 1024, 14, 14), "channels_last")]
RESNET50 += [((256, 2048, 7, 7), "channels_last")]
FEATURES = [((4096, 256), "1-d")]
SMALL = [((64, 64), "1-d"), ((512, 64), "1-d"), ((1024, 128), "1-d"), ((64, 16, 8, 8), "NCHW")]
SHAPES = {"all": FEATURES + IMAGES, "1d": FEATURES, "2d": IMAGES, "16x16": IMAGES[2:], "small": SMALL}
SHAPES["channels_last"] = IMAGES[1::2]

ROWS: list[Row] = []


def clock(device: str) -> Callable[[], float]:
    if device != "cpu":
        return lambda: torch.cuda.synchronize() or time.perf_counter()
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def in_turns(runs: dict[str, Callable[[], None]], repeat: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each, over turns in which each runs once, after two turns to warm up."""
    now = clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 2):
        for name, run in runs.items():
            start = now()
            run()
            if turn >= 2:
                seconds[name].append(now() - start)
    return seconds


def ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def compared(seconds: dict[str, list[float]], names: Iterable[str], base: str, **where: object) -> None:
    """Keep a row: milliseconds of BatchNorm, and the spread of each rival's ratios to it."""
    found = {name: ratios(seconds[name], seconds["plain"]) for name in names if name in seconds}
    ROWS.append({**where, base: spread(seconds["plain"], 1e3), **{name: found.get(name, "") for name in names}})


def passes(module: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], None]:
    def run() -> None:
        module(x).backward(upstream)
        x.grad = None

    return run


def shapes_for(arguments: argparse.Namespace) -> list[tuple[tuple[int, ...], str]]:
    if arguments.device != "cpu":
        return RESNET50
    return SHAPES[arguments.shapes]


def turns(shape: tuple[int, ...], arguments: argparse.Namespace) -> int:
    return arguments.repeat * (8 if math.prod(shape) <= 1 << 20 else 1)


def op(arguments: argparse.Namespace) -> None:
    names = ("contiguous", "strided", "chunks", "splits", "tabnet")
    header(f"forward + backward, {arguments.dtype}", "input", "format", "ghost", "threads", "plain, ms", *names)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape, memory in shapes_for(arguments):
            x, upstream = tensors(shape, memory, arguments.device, getattr(torch, arguments.dtype))
            for size in arguments.ghosts:
                modules = rivals(shape, memory, size, arguments.device)
                repeat = turns(shape, arguments)
                seconds = in_turns({k: passes(m, x, upstream) for k, m in modules.items()}, repeat, arguments.device)
                shown = [name for name in names if name != "tabnet" or name in seconds]
                compared(seconds, shown, "plain, ms", input=str(shape), format=memory, ghost=size, threads=threads)
                row(
                    str(shape), memory, str(size), str(threads), f"{1e3 * statistics.median(seconds['plain']):.2f}",
                    *(f"{ratio(seconds[n], seconds['plain']):.2f}" if n in seconds else "-" for n in names),
                )  # fmt: skip


def cnn() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    widths = (3, 32, 32, 64, 64, 128, 128)
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(a, b, 3, stride=1 + (i in (2, 4)), padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)), torch.randn(
        256, 3, 32, 32
    )


def mlp() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(4096, 256)


MODELS = {"cnn": ("CNN, 6 convolutions, 256 x 32 x 32", cnn), "mlp": ("MLP, 4 layers of 256, 4096", mlp)}


def step(arguments: argparse.Namespace) -> None:
    names = ("contiguous", "strided", "chunks")
    header("a training step, SGD with momentum", "model", "format", "ghost", "threads", "plain, ms", *names)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for label, build in (MODELS[name] for name in arguments.models):
            for memory in ("NCHW", "channels_last") if build is cnn else ("1-d",):
                for size in arguments.ghosts[:: max(1, len(arguments.ghosts) - 1)]:
                    runs = {}
                    model, x = build()
                    if memory == "channels_last":
                        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
                    target = torch.randint(10, (len(x),))
                    for name in ("plain", *names):
                        net = copy.deepcopy(model)
                        if name in ("contiguous", "strided"):
                            convert_ghost_batchnorm(net, size, grouping=name)
                        if name == "chunks":
                            for i, layer in enumerate(net):
                                net[i] = (
                                    Chunks(layer, size) if isinstance(layer, nn.modules.batchnorm._BatchNorm) else layer
                                )
                        runs[name] = training_step(net, x, target)
                    seconds = in_turns(runs, arguments.repeat * (2 if build is mlp else 1), "cpu")
                    compared(seconds, names, "plain, ms", model=label, format=memory, ghost=size, threads=threads)
                    row(
                        label, memory, str(size), str(threads), f"{1e3 * statistics.median(seconds['plain']):.1f}",
                        *(f"{ratio(seconds[n], seconds['plain']):.2f}" for n in names),
                    )  # fmt: skip


def training_step(net: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()

    return run


def compiled(arguments: argparse.Namespace) -> None:
    names = ("contiguous", "strided")
    header("forward + backward, torch.compile", "input", "format", "ghost", "threads", "compiled plain, ms", *names)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape, memory in shapes_for(arguments):
            x, upstream = tensors(shape, memory, arguments.device, getattr(torch, arguments.dtype))
            for size in arguments.ghosts[:: max(1, len(arguments.ghosts) - 1)]:
                torch._dynamo.reset()
                modules = {
                    k: m for k, m in rivals(shape, memory, size, arguments.device).items() if k in ("plain", *names)
                }
                runs = {k: passes(torch.compile(m, fullgraph=True), x, upstream) for k, m in modules.items()}
                repeat = turns(shape, arguments)
                seconds = in_turns(runs, repeat, arguments.device)
                where = {"input": str(shape), "format": memory, "ghost": size, "threads": threads}
                compared(seconds, names, "compiled plain, ms", **where)
                row(
                    str(shape), memory, str(size), str(threads), f"{1e3 * statistics.median(seconds['plain']):.2f}",
                    *(f"{ratio(seconds[n], seconds['plain']):.2f}" for n in names),
                )  # fmt: skip


def memory(arguments: argparse.Namespace) -> None:
    names = ("contiguous", "strided", "chunks")
    header("highest memory of forward + backward", "input", "format", "ghost", "plain, MiB", *names)
    torch.set_num_threads(1)
    for shape, order in shapes_for(arguments):
        x, upstream = tensors(shape, order, "cpu", torch.float32)
        for size in arguments.ghosts:
            modules = rivals(shape, order, size, "cpu")
            peaks = {name: [peak(passes(modules[name], x, upstream)) for _ in range(5)] for name in ("plain", *names)}
            least = {name: statistics.median(values) for name, values in peaks.items()}
            found = {name: ratios(peaks[name], peaks["plain"]) for name in names}
            where = {"input": str(shape), "format": order, "ghost": size}
            ROWS.append({**where, "plain, MiB": spread(peaks["plain"]), **found})
            row(
                str(shape), order, str(size), f"{least['plain']:.0f}",
                *(f"{least[name] / least['plain']:.2f}" for name in names),
            )  # fmt: skip


def peak(run: Callable[[], None]) -> float:
    """Return the MiB by which a run raises this process's resident memory at its highest (Linux)."""
    run()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def limit(arguments: argparse.Namespace) -> None:
    header("bare passes over contiguous ghosts", "input", "format", "ghost", "threads", "plain, ms", "passes", "ghosts")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape, order in shapes_for(arguments):
            x, upstream = tensors(shape, order, "cpu", torch.float32)
            for size in arguments.ghosts:
                modules = rivals(shape, order, size, "cpu")
                runs = {name: passes(modules[name], x, upstream) for name in ("plain", "contiguous")}
                bare = bare_passes if len(shape) == 2 else bare_image_passes
                runs["passes"] = bare(x.detach(), upstream, size)
                seconds = in_turns(runs, turns(shape, arguments), "cpu")
                where = {"input": str(shape), "format": order, "ghost": size, "threads": threads}
                compared(seconds, ("passes", "contiguous"), "plain, ms", **where)
                row(
                    str(shape), order, str(size), str(threads), f"{1e3 * statistics.median(seconds['plain']):.2f}",
                    *(f"{ratio(seconds[n], seconds['plain']):.2f}" for n in ("passes", "contiguous")),
                )  # fmt: skip


def convert(arguments: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "ghost"))
    from architectures import resnet50

    seconds = []
    for _ in range(arguments.repeat):
        model = resnet50()
        start = time.perf_counter()
        convert_ghost_batchnorm(model, 32)
        seconds.append(time.perf_counter() - start)
    layers = sum(type(layer).__name__ == "GhostBatchNorm2d" for layer in model.modules())
    ROWS.append({"model": "ResNet-50", "layers": layers, "ms": spread(seconds, 1e3)})
    print(f"ResNet-50, {layers} layers: {1e3 * statistics.median(seconds):.2f} ms")


def header(title: str, *columns: str) -> None:
    print(f"{title}\n")
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def keep_freed_memory() -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped alone
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def main() -> None:
    sections = {"op": op, "step": step, "compile": compiled, "memory": memory, "convert": convert, "limit": limit}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=sections)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ghosts", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--shapes", choices=SHAPES, default="all")
    parser.add_argument("--models", choices=("cnn", "mlp"), nargs="+", default=["mlp", "cnn"])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reuse-memory", action="store_true")
    add_json(parser)
    arguments = parser.parse_args()
    if arguments.reuse_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    sections[arguments.section](arguments)
    write_rows(arguments.json, ROWS)


if __name__ == "__main__":
    main()
