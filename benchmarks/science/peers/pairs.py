"""Write the pairs for other costs than the squared in the Wasserstein-2 benchmark's format, for ``maps.py`` to read.

python -m benchmarks.science.peers.pairs FOLDER [--seed 1]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.science.known_pairs import KnownPair, displaced, rays

__all__ = ["DIMS", "main", "write"]

DIMS = (2, 8, 32)


def write(path: Path, pair: KnownPair) -> None:
    """Write a pair's samples, and the total variance of its target."""
    named = {"train_x": pair.source, "train_y": pair.target, "test_x": pair.x, "test_map": pair.true}
    arrays = {name: samples.numpy() for name, samples in named.items()}
    np.savez(path, var_out=np.float64(pair.variance), **arrays)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pairs of each dimension."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the pairs: another truth each")
    args = parser.parse_args(arguments)
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    for dim in DIMS:
        write(folder / f"rays_D{dim}.npz", rays(dim, seed=args.seed))
        write(folder / f"powers_D{dim}.npz", displaced(dim, "pnorm(p=1.5)", seed=args.seed))


if __name__ == "__main__":
    main()
