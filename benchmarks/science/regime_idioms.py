"""Every way to size a schedule, under LargeBatchRegime, against real runs at the reference batch.

Each script is run to its end at a small size, and every rate compared. At real sizes it is run up to its first batch:
if it is not refused there, its lengths must be the reference run's. Prints every cell that is neither, and counts.

Run: python -m benchmarks.science.regime_idioms            (each script at one share and batch, three minutes)
     python -m benchmarks.science.regime_idioms --all      (to the end at every share and batch, an hour and a half)
     python -m benchmarks.science.regime_idioms --all --batches 3 --processes 2    (at the ratios 1.5, 4 and 32)
     python -m benchmarks.science.regime_idioms --write    (as either, and writes docs/schedules.md)
     python -m benchmarks.science.regime_idioms --resume   (cut at twenty updates and resumed, bit for bit)
     python -m benchmarks.science.regime_idioms StepLR     (the schedulers or idioms with this in their names)

Schedulers of transformers and timm are tried where these are installed.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "regime"))
from idiom_page import PAGE, page
from idiom_resumes import cells_to_resume, different_resumes
from idiom_schedules import schedulers
from idiom_scripts import Outcome, outcome, start
from regime_idioms import IDIOMS, REAL, SMALL, Cell, balanced_cells, every_cell, told_cells


def resume(only: str, points: int = 20) -> None:
    wrong = tried = 0
    for seed, cell in enumerate(cells_to_resume(schedulers())):
        if only in cell.name or only in cell.idiom:
            with tempfile.TemporaryDirectory() as folder:
                different, updates = different_resumes(cell, Path(folder), points, seed)
            wrong, tried = wrong + len(different), tried + min(points, updates - 1)
            print(*said(cell), f"{updates} updates", f"differs from {different}" if different else "equal", flush=True)
    print(f"{wrong} of {tried} resumed runs differ")


def said(cell: Cell) -> tuple[str, ...]:
    batches = cell.batches
    return (
        f"{cell.name} | {cell.interval} | {cell.idiom} | train_longer={cell.share} |",
        f"{batches.reference} -> {batches.loader} x {batches.accumulate}, {batches.samples} x {batches.epochs} |",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every share and batch")
    parser.add_argument("--write", action="store_true", help="write docs/schedules.md")
    parser.add_argument("--batches", type=int, help="the first so many of the small batches")
    parser.add_argument("--processes", type=int, default=1, help="of --all")
    parser.add_argument("--resume", action="store_true", help="resume, instead of comparing with the reference run")
    parser.add_argument("only", nargs="?", default="", help="part of the name of a scheduler or idiom")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.resume:
        resume(options.only)
        return
    small = SMALL[: options.batches]
    asking = every_cell(small) if options.all else balanced_cells(small)
    if options.all:
        chosen = [cell for cell in asking if options.only in cell.name or options.only in cell.idiom]
        compare("run to the end", outcome, chosen, options.processes)
        return
    found = [
        compare(title, run, [cell for cell in cells if options.only in cell.name or options.only in cell.idiom])
        for title, run, cells in (
            ("run to the end", outcome, asking),
            ("at real sizes, up to the first batch", start, [*balanced_cells(REAL), *told_cells()]),
        )
    ]
    if options.write:
        PAGE.write_text(page(*found), encoding="utf-8")


def quietly(run: Callable[..., Outcome], cell: Cell) -> Outcome:
    warnings.simplefilter("ignore")
    return run(*cell)


def compare(
    title: str, run: Callable[..., Outcome], cells: list[Cell], processes: int = 1
) -> list[tuple[Cell, Outcome]]:
    rows: dict[tuple[str, str], Counter[str]] = {}
    all_found = []
    began = time.perf_counter()
    each = partial(quietly, run)
    pool = ProcessPoolExecutor(processes) if processes > 1 else None
    outcomes = map(each, cells) if pool is None else pool.map(each, cells, chunksize=16)
    for cell, found in zip(cells, outcomes, strict=True):
        all_found.append((cell, found))
        rows.setdefault((cell.idiom, cell.interval), Counter())[found.word] += 1
        if found.word == "WRONG" or (found.word == "refused" and IDIOMS[cell.idiom].asks):
            print(*said(cell), found.word, found.detail, flush=True)
    if pool is not None:
        pool.shutdown()
    print(title)
    words = ("equal", "refused", "WRONG")
    for (idiom, interval), counts in rows.items():
        print(f"  {idiom:78} {interval:6}", *(f"{counts[word]:5} {word}" for word in words))
    total = sum(rows.values(), Counter())
    print(f"  {'all':85}", *(f"{total[word]:5} {word}" for word in words), f"in {time.perf_counter() - began:.0f} s")
    return all_found


if __name__ == "__main__":
    main()
