"""This tree against another checkout of the package: the same timings of both, in turns, each in a fresh process.

    python -m benchmarks.speed.against_revision --before CHECKOUT [--turns 5] [--only NAME ...] [--threads 1]

Each turn measures every group once by the package in ``CHECKOUT`` and once by this one, the one and the other first in
turn. A process gives seconds of the processor for each of its cases, the median of some repeats; the pair of a turn
gives a ratio, below 1 where this tree is faster. The table has median and quartiles of the ratios over the turns. Only
names are used that both have: those that users type. Run it on a machine that does nothing else; the default takes
about 20 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Cases = Iterator[tuple[str, float]]
# What is imported by whom: the whole face, its light parts and its heavy ones.
IMPORTS = {
    "import lightning_gap": "import lightning_gap",
    "the callbacks": "from lightning_gap import GhostBatchNorm, LargeBatchRegime, UltraSlowDiffusion",
    "MongeMap": "from lightning_gap import MongeMap, SamplesDataModule",
    "monge_gap": "from lightning_gap import monge_gap",
    "lightning-gap --help": "from lightning_gap.cli import parser; parser().format_help()",
}


def seconds_of(run: Callable[[], Any], least: float, most: int = 50) -> float:
    """Return the median seconds of the processor of a call, after one to warm up, over at least some seconds."""
    run()
    found: list[float] = []
    while not found or (sum(found) < least and len(found) < most):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return median(found)


def ghost(quick: bool) -> Cases:
    """Yield forward and backward of Ghost BN in each layout."""
    import torch
    from torch import nn

    from lightning_gap import convert_ghost_batchnorm

    shapes = [((4096, 256), "1-d"), ((256, 128, 16, 16), "NCHW"), ((256, 128, 16, 16), "channels_last")]
    for shape, memory in shapes[:1] if quick else shapes:
        order = torch.channels_last if memory == "channels_last" else torch.contiguous_format
        x, upstream = (torch.randn(shape).contiguous(memory_format=order) for _ in range(2))
        x.requires_grad_()
        for size in (32, 128):
            for grouping in ("contiguous", "strided"):
                plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])
                layer = convert_ghost_batchnorm(plain, size, grouping=grouping)

                def run(layer: nn.Module = layer, x: Any = x, upstream: Any = upstream) -> None:
                    layer(x).backward(upstream)
                    x.grad = None

                yield f"{memory}, ghosts of {size}, {grouping}", seconds_of(run, 0.01 if quick else 0.5)


def _fit(module: Any, data: Any, callbacks: list[Any], updates: int, accumulate: int = 1) -> float:
    """Return the seconds of the processor of an update: of a fit's second half."""
    from lightning.pytorch import Callback, Trainer

    class Clock(Callback):
        starts: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.starts.append(time.process_time())

    clock = Clock()
    clock.starts = []
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=updates, accumulate_grad_batches=accumulate,
        callbacks=[clock, *callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    first = len(clock.starts) // 2
    return accumulate * (clock.starts[-1] - clock.starts[first]) / (len(clock.starts) - 1 - first)


def _small(width: int) -> tuple[Any, Any]:
    """Return a module of little work, and data for it."""
    import torch
    from lightning.pytorch import LightningModule
    from torch.utils.data import DataLoader, TensorDataset

    class Small(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 30)]

    torch.manual_seed(0)
    return Small(), DataLoader(TensorDataset(torch.randn(1600, 16), torch.randint(4, (1600,))), 32)


def regime(quick: bool) -> Cases:
    """Yield an update of a small network under each callback of the regime."""
    from lightning_gap import GradientNoiseScale, LargeBatchRegime

    updates = 40 if quick else 1500
    cases: dict[str, tuple[Callable[[], list[Any]], int]] = {
        "no callback": (list, 1),
        "LargeBatchRegime": (lambda: [LargeBatchRegime(8)], 1),
        "with warm-up and clipping": (lambda: [LargeBatchRegime(8, warmup_updates=100, clip_norm=5.0)], 1),
        "GradientNoiseScale": (lambda: [GradientNoiseScale(every_n_updates=1)], 2),
    }
    for name, (callbacks, accumulate) in cases.items():
        module, data = _small(32)
        yield f"an update, {name}", _fit(module, data, callbacks(), updates // accumulate, accumulate)


def diffusion(quick: bool) -> Cases:
    """Yield an update of a network of 1.3 million weights that is followed, seldom and often."""
    from lightning_gap import UltraSlowDiffusion

    for points in (20, 2000):
        module, data = _small(64 if quick else 65_536)
        name = f"an update, UltraSlowDiffusion, {points} points a decade"
        yield name, _fit(module, data, [UltraSlowDiffusion(points_per_decade=points)], 40 if quick else 200)


def transport(quick: bool) -> Cases:
    """Yield value and gradient of divergence and gap, for three costs."""
    import torch

    from lightning_gap import monge_gap, sinkhorn_divergence

    for n in (64,) if quick else (256, 1024, 4096):
        torch.manual_seed(0)
        x, y = torch.randn(n, 8), 0.5 * torch.randn(n, 8) + 1
        for cost in ("sqeuclidean", "euclidean", "cosine"):
            for function in (sinkhorn_divergence, monge_gap):

                def run(function: Any = function, cost: str = cost, x: Any = x, y: Any = y) -> None:
                    leaf = y.clone().requires_grad_()
                    function(x, leaf, cost=cost).backward()

                yield f"{function.__name__}, {cost}, n = {n}", seconds_of(run, 0.01 if quick else 1.0, 20)


def training(quick: bool) -> Cases:
    """Yield a training step of a map."""
    import torch

    from lightning_gap import MongeMap, SamplesDataModule

    for dim in (2, 32):
        torch.manual_seed(0)
        x, y = torch.randn(4096, dim), torch.randn(4096, dim) * 0.5 + 1
        data = SamplesDataModule(x, y, batch_size=256, val_fraction=0)
        model = MongeMap(dim=dim, hidden=(64, 64, 64))
        yield f"a step of MongeMap, d = {dim}, batch 256", _fit(model, data, [], 8 if quick else 160)


def command(quick: bool) -> Cases:
    """Yield ``lightning-gap transport`` on a file of 50 features."""
    import contextlib
    import io

    import numpy as np
    import torch
    from lightning.pytorch import Trainer

    from lightning_gap import MongeMap
    from lightning_gap.cli import main

    rows = 2_000 if quick else 400_000
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        checkpoint, source, output = (str(Path(folder, name)) for name in ("map.ckpt", "in.npy", "out.npy"))
        torch.manual_seed(0)
        trainer = Trainer(accelerator="cpu", barebones=True)
        trainer.strategy.connect(MongeMap(dim=50))
        trainer.save_checkpoint(checkpoint)
        np.save(source, np.random.default_rng(0).normal(size=(rows, 50)).astype("f4"))
        words = ["transport", checkpoint, source, output, "--overwrite"]
        yield f"transport of {rows:,} rows", seconds_of(lambda: main(words), 0.01 if quick else 3.0)


def imports(quick: bool) -> Cases:
    """Yield imports, each in a process of its own."""
    for name, line in IMPORTS.items():
        code = f"import time; start = time.process_time(); {line}; print(time.process_time() - start)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
                for _ in range(1 if quick else 3)]  # fmt: skip
        yield f"import: {name}", median(map(float, runs))


GROUPS: dict[str, Callable[[bool], Cases]] = {
    "ghost": ghost,
    "regime": regime,
    "diffusion": diffusion,
    "transport": transport,
    "training": training,
    "command": command,
    "imports": imports,
}


def measure(group: str, quick: bool) -> None:
    """Print the seconds of a group's cases, by the package that this process finds."""
    import logging

    import lightning_gap

    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = dict(GROUPS[group](quick))
    print(json.dumps({"package": str(Path(lightning_gap.__file__).resolve().parents[1]), "seconds": found}))


def measured_by(tree: Path, group: str, threads: int, quick: bool) -> dict[str, float]:
    """Return the seconds of a group's cases, by the package of a checkout, in a fresh process."""
    environment = os.environ | {
        "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    # By its file: run as a module, it would find the package of this tree.
    words = [sys.executable, __file__, "--measure", group, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{group} by {tree} failed: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if Path(found["package"]) != tree:
        raise SystemExit(f"{group} was measured by the package in {found['package']}, not by that in {tree}")
    return dict(found["seconds"])


def main() -> None:
    """Measure both trees in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all is well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--measure", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.quick)
        return
    if options.before is None or not (options.before / "lightning_gap" / "__init__.py").is_file():
        parser.error("--before: give the folder of a checkout, which has lightning_gap in it")
    from benchmarks.measurements import ratios, spread, write_rows

    trees = {"before": options.before.resolve(), "after": ROOT}
    rows = []
    print("| group | case | before, ms | after / before, median | quartiles |\n| --- | --- | --- | --- | --- |")
    for group in options.only:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in trees}
        for turn in range(options.turns):
            for side in list(trees)[:: 1 if turn % 2 == 0 else -1]:
                found[side].append(measured_by(trees[side], group, options.threads, options.quick))
        for case in found["after"][0]:
            before, after = ([turn[case] for turn in found[side]] for side in trees)
            row = {"group": group, "case": case, "before, ms": spread(before, 1e3), "ratio": ratios(after, before)}
            rows.append(row)
            ratio = row["ratio"]
            print(f"| {group} | {case} | {row['before, ms']['median']:.4g} | {ratio['median']:.3f} | "
                  f"{ratio['low']:.3f} to {ratio['high']:.3f} |", flush=True)  # fmt: skip
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
