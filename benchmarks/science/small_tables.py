"""How long the default learning rate is to last where samples are few.

    python -m benchmarks.science.small_tables --data FOLDER [--only REGEX] [--samples 150 450] [--most 0 500]
        [--seeds 0 1 2] [--json FILE]

The default map for the Euclidean cost, and for the geodesic one on a sphere, is trained on a few samples of each side
of the pairs of ``real_pairs.py``, or all there are, by ``Trainer(max_steps=500)``, in batches of 256 or of all. Its
learning rate decays over twenty passes of them, or over as many updates as there are samples, up to a number, where
these are more. Scored are samples that none has seen: the energy distance of their images from the target's, as a
U-statistic, in mean and standard deviation over the seeds, each of which draws other samples. The floor is the training
samples of the target in place of images. One thread.
"""

import argparse
import logging
import os
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.measurements import Row, add_json, six_digits, write_rows
from benchmarks.science.default_maps import QUIET
from benchmarks.science.held_out_energy import unbiased_energy_distance
from benchmarks.science.real_pairs import ON_THE_SPHERE, Pair, pairs
from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import defaults


def fitted(pair: Pair, count: int, seed: int, limits: Sequence[int]) -> list[Row]:
    """Return a row for each limit of the updates, of the same samples."""
    draws = np.random.default_rng(seed)
    source, target = (torch.as_tensor(side[draws.permutation(len(side))[:count]]).float() for side in pair.train)
    cost = ON_THE_SPHERE if pair.sphere else "euclidean"
    rows: list[Row] = []
    for most in limits:
        seed_everything(seed, verbose=False)
        data = SamplesDataModule(source, target, **pair.coordinates)
        x, y = pair.held_out(data)
        model, trainer = MongeMap(cost=cost), Trainer(max_steps=500, max_epochs=-1, **QUIET)
        began = time.process_time()
        with patch.object(defaults, "_UPDATES", most):
            trainer.fit(model, data)
        seconds = time.process_time() - began
        with torch.no_grad():
            images = model.eval()(x.float()).double()
        some = data.training_samples()[1].double()
        row = {
            "pair": pair.name, "n": len(source), "cost": cost, "updates": most, "seed": seed, "seconds": seconds,
            "energy": unbiased_energy_distance(images, y), "floor": unbiased_energy_distance(some, y),
        }  # fmt: skip
        rows.append(six_digits(row))
    return rows


def main() -> None:
    """Print a row for each pair, number of samples and limit of the updates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="pairs whose names this expression finds")
    parser.add_argument("--samples", type=int, nargs="+", default=[150, 450])
    parser.add_argument("--most", type=int, nargs="+", default=[0, 500], help="updates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_json(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| pair | n | cost | updates, at most | energy distance | floor | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    everything: list[Row] = []
    for pair in pairs(given.data, lambda name: re.search(given.only, name)):
        for count in given.samples:
            rows = [row for seed in given.seeds for row in fitted(pair, count, seed, given.most)]
            everything += rows
            for most in given.most:
                energy, floor, seconds = (
                    np.array([row[name] for row in rows if row["updates"] == most])
                    for name in ("energy", "floor", "seconds")
                )
                error = f" ± {energy.std(ddof=1):.4f}" if len(energy) > 1 else ""
                print(
                    f"| {pair.name} | {rows[0]['n']} | {rows[0]['cost']} | {most} | {energy.mean():.4f}{error} | "
                    f"{floor.mean():.4f} | {seconds.mean():.0f} |",
                    flush=True,
                )
    write_rows(given.json, everything)


if __name__ == "__main__":
    main()
