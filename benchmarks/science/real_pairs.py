"""Pairs of samples from real data, and what is held out of them: what a map that nobody tuned may be given.

Files, in one folder: ``kang_ifnb.npz``, ``sachs_flow.npz``, ``tutorial_data.npz``, ``w2_mix3to10_D{D}.npz`` (training
samples alone), ``color_images.npz``, ``monge_gap_reference.npz``, ``mnist_full.npz``, ``cifar10_jpeg.npz``. A pair
whose file is absent is left out.
"""

import io
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gap import SamplesDataModule

__all__ = ["COSTS", "ON_THE_SPHERE", "Pair", "pairs"]

COSTS = ("sqeuclidean", "euclidean", "pnorm(p=1.5)", "pnorm(p=3)", "sqpnorm(p=1.5)", "elastic(lam=0.5)", "cosine")
ON_THE_SPHERE = "geodesic"
TRAINED, HELD_OUT = 4096, 2048  # most samples of a side
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pair:
    """Samples of a source and a target, to train on and held out.

    Attributes:
        name: Data set and task, ``"kang/genes"``.
        train: ``(n, d)`` and ``(m, d)`` samples.
        test: Held-out samples, likewise.
        types: Conditions of the rows of ``train`` and of ``test``, where a map is to be conditional.
        coordinates: What :class:`SamplesDataModule` is told of the coordinates to learn in.
        sphere: Whether the samples are of norm 1.
        small: Whether it is one of those that every cost is tried on.
    """

    name: str
    train: tuple[Array, Array]
    test: tuple[Array, Array]
    types: tuple[tuple[Array, Array], tuple[Array, Array]] | None = None
    coordinates: dict[str, Any] = field(default_factory=dict)
    sphere: bool = False
    small: bool = False

    def data(self, **options: Any) -> SamplesDataModule:
        """Return the training samples as a user hands them over."""
        conditions = {} if self.types is None else {"conditions": self.types[0], "small_conditions": "shrink"}
        return SamplesDataModule(*self.train, **self.coordinates, **conditions, **options)

    def held_out(self, data: SamplesDataModule) -> tuple[Tensor, Tensor]:
        """Return the held-out samples in the coordinates of training, in double."""
        both = (torch.from_numpy(x).double() for x in self.test)
        if data.representation is None:
            return tuple(both)  # type: ignore[return-value]
        return tuple(deepcopy(data.representation).double().encode(x) for x in both)  # type: ignore[return-value]


def pairs(folder: Path, pattern: Callable[[str], Any] = bool) -> Iterator[Pair]:
    """Yield the pairs whose name a function accepts, of the files that are there."""
    for prefix, (file, make) in SOURCES.items():
        if (folder / file).exists():
            for name, build in make(folder / file).items():
                if pattern(f"{prefix}/{name}"):
                    yield build(f"{prefix}/{name}")


Makers = dict[str, Callable[[str], Pair]]


def _some(x: Array, most: int, seed: int = 0) -> Array:
    rows = np.random.default_rng(seed).permutation(len(x))[:most]
    return np.ascontiguousarray(x[rows])


def _split(x: Array, y: Array, share: float = 0.25) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return what is trained on, and a random share that is held out."""
    train, test = [], []
    for seed, samples in enumerate((x, y)):
        samples = _some(np.asarray(samples, dtype=np.float32), len(samples), 100 + seed)
        held_out = min(int(share * len(samples)), HELD_OUT)
        test.append(samples[:held_out])
        train.append(samples[held_out : held_out + TRAINED])
    return (train[0], train[1]), (test[0], test[1])


@cache
def _load(path: Path) -> dict[str, Array]:
    with np.load(path) as z:
        return {name: z[name] for name in z.files}


def _kang(path: Path) -> Makers:
    z = _load(path)
    x, kind = z["logcounts"].astype(np.float32), z["cell_type_names"][z["cell_type"]]
    treated, trained = z["treated"] == 1, z["patient"] != 107
    parts = [~treated & trained, treated & trained, ~treated & ~trained, treated & ~trained]

    def build(name: str, coordinates: dict[str, Any], of_type: str = "", by_type: bool = False) -> Pair:
        rows = [part & (kind == of_type) if of_type else part for part in parts]
        a, b, c, d = (x[r] for r in rows)
        types = ((kind[rows[0]], kind[rows[1]]), (kind[rows[2]], kind[rows[3]])) if by_type else None
        return Pair(name, (a, b), (c, d), types, coordinates, small=not of_type and not by_type)

    made = {
        "20 components": lambda name: build(name, {"components": 20}),
        "100 genes, standardized": lambda name: build(name, {"standardize": True}),
        "100 genes": lambda name: build(name, {}),
        "20 components, by type": lambda name: build(name, {"components": 20}, by_type=True),
    }
    for of_type in np.unique(kind[~trained]):
        made[f"20 components, {of_type}"] = lambda name, t=of_type: build(name, {"components": 20}, t)  # type: ignore[misc]
    return made


def _sachs(path: Path) -> Makers:
    z = _load(path)
    condition, x = z["condition_names"][z["condition"]], np.log(z["X_raw"])
    control = x[np.isin(condition, ["cd3cd28", "cd3cd28_icam2"])]

    def build(name: str, treatment: str) -> Pair:
        made = Pair(name, *_split(control, x[condition == treatment]), coordinates={"standardize": True})
        return made if treatment != "cd3cd28_u0126" else Pair(**{**vars(made), "small": True})

    treatments = [n for n in z["condition_names"] if n not in ("cd3cd28", "cd3cd28_icam2")]
    return {str(t).removeprefix("cd3cd28_"): lambda name, t=t: build(name, t) for t in treatments}  # type: ignore[misc]


def _tutorial(path: Path) -> Makers:
    def build(name: str) -> Pair:
        z = _load(path)
        train = tuple(_some(z[key], TRAINED) for key in ("train_x", "train_y"))
        return Pair(name, train, (z["test_x"], z["test_y"]), small=True)  # type: ignore[arg-type]

    return {"moons to S": build}


def _w2(path: Path) -> Makers:
    def build(name: str) -> Pair:
        with np.load(path) as z:
            x, y = z["train_x"], z["train_y"]
        return Pair(name, *_split(x, y), small="D8" in path.name)

    return {"Mix3toMix10": build}


def _colors(path: Path) -> Makers:
    def build(name: str, source: str, target: str) -> Pair:
        z = _load(path)
        made = (z[key].reshape(-1, 3).astype(np.float32) / 255 for key in (source, target))
        return Pair(name, *_split(*made), small=source == "ocean_day")

    chosen = [
        ("ocean_day", "ocean_sunset"), ("autumn", "woods"), ("fallingwater", "mandrill_256"),
        ("house_256", "ocean_day"),
    ]  # fmt: skip
    return {f"{a} to {b}": lambda name, a=a, b=b: build(name, a, b) for a, b in chosen}  # type: ignore[misc]


def _reference(path: Path) -> Makers:
    def build(name: str, key: str) -> Pair:
        with np.load(path) as z:
            x, y = z[f"{key}/X"], z[f"{key}/Y"]
        return Pair(name, *_split(x, y), sphere=key.startswith("sph"), small=key in small)

    small = {"euc2/n512/d8", "euc2/n128/d32", "sph/n256/d3", "sph/n256/d32"}
    chosen = [
        *("euc/n128/d2", "euc/n256/d8", "euc/n128/d32", "euc2/n128/d2", "euc2/n1024/d2", "euc2/n128/d8"),
        *("euc2/n512/d8", "euc2/n128/d32", "euc2/n512/d32", "euc2/n1024/d32", "sph/n256/d3", "sph/n256/d32"),
    ]
    return {key: lambda name, key=key: build(name, key) for key in chosen}  # type: ignore[misc]


def _components(x: Array, y: Array, dim: int) -> tuple[Array, Array]:
    both = np.concatenate([x, y]).astype(np.float64)
    both -= both.mean(0)
    axes = np.linalg.eigh(both.T @ both)[1][:, : -dim - 1 : -1]
    z = (both @ axes).astype(np.float32)
    return z[: len(x)], z[len(x) :]


def _of_images(images: Callable[[int], Array], tasks: list[tuple[int, int]], names: list[str]) -> Makers:
    """Return pairs of classes, in pixels from 0 to 1 and in principal components (of all images, as is usual)."""

    def build(name: str, source: int, target: int, dim: int | None) -> Pair:
        x, y = (images(label).reshape(-1, images(label)[0].size).astype(np.float32) / 255 for label in (source, target))
        return Pair(name, *_split(*(_components(x, y, dim) if dim else (x, y))), small=dim == 50 and source == 3)

    return {
        f"{names[a]} to {names[b]}, {f'{dim} components' if dim else 'pixels'}": (
            lambda name, a=a, b=b, dim=dim: build(name, a, b, dim)  # type: ignore[misc]
        )
        for a, b in tasks
        for dim in (20, 50, None)
    }


def _mnist(path: Path) -> Makers:
    def images(label: int) -> Array:
        z = _load(path)
        return z["train_images"][z["train_labels"] == label][:5000]

    return _of_images(images, [(3, 8), (0, 1), (4, 9)], [str(k) for k in range(10)])


def _cifar(path: Path) -> Makers:
    @cache
    def images(label: int) -> Array:
        from PIL import Image

        z = _load(path)
        rows = np.flatnonzero(z["train_labels"] == label)[:3000]
        jpeg, offsets = z["train_jpeg"], z["train_offsets"]
        files = (io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in rows)
        return np.stack([np.asarray(Image.open(file)) for file in files])

    with np.load(path) as z:
        names = [str(name) for name in z["classes"]]
    made = _of_images(images, [(3, 5), (0, 8)], names)
    return {name: build for name, build in made.items() if "pixels" not in name}


SOURCES: dict[str, tuple[str, Callable[[Path], Makers]]] = {
    "kang": ("kang_ifnb.npz", _kang),
    "sachs": ("sachs_flow.npz", _sachs),
    "tutorial": ("tutorial_data.npz", _tutorial),
    **{f"w2 D{d}": (f"w2_mix3to10_D{d}.npz", _w2) for d in (2, 4, 8, 16, 32)},
    "colors": ("color_images.npz", _colors),
    "reference": ("monge_gap_reference.npz", _reference),
    "mnist": ("mnist_full.npz", _mnist),
    "cifar": ("cifar10_jpeg.npz", _cifar),
}
