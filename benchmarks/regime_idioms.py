"""Every way to size a schedule, under LargeBatchRegime, against real runs at the reference batch.

Prints every cell that is neither equal nor refused, and how many there are of each.

Run: python benchmarks/regime_idioms.py            (each script at one share and batch, three minutes)
     python benchmarks/regime_idioms.py --all      (at every share and batch, forty minutes)
     python benchmarks/regime_idioms.py StepLR     (the schedulers or idioms with this in their names)

Schedulers of transformers and timm are tried where these are installed.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "regime"))
from regime_idioms import BATCHES, balanced_cells, every_cell, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every share and batch")
    parser.add_argument("only", nargs="?", default="", help="part of the name of a scheduler or idiom")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cells = every_cell(BATCHES) if options.all else balanced_cells()
    words: Counter[str] = Counter()
    rows: dict[tuple[str, str], Counter[str]] = {}
    began = time.perf_counter()
    for cell in cells:
        if options.only not in cell.name and options.only not in cell.idiom:
            continue
        found = outcome(*cell)
        words[found.word] += 1
        rows.setdefault((cell.idiom, cell.interval), Counter())[found.word] += 1
        if found.word == "WRONG":
            print(*cell[:3], f"train_longer={cell.share}", *cell.batches, found.detail, sep=" | ", flush=True)
    for (idiom, interval), counts in rows.items():
        print(f"{idiom:80} {interval:6}", *(f"{counts[word]:4} {word}" for word in ("equal", "refused", "WRONG")))
    print(dict(words), f"in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
