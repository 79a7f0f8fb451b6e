"""Conditions of named columns as vectors: categories, numbers and embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_gap.monge.samples.combinations import name_of
from lightning_gap.monge.samples.features import listed

__all__ = ["ConditionEncoding"]

Texts = Sequence[str]
# A span of numbers above which logarithms are taken.
_DECADE = 10.0


class ConditionEncoding(nn.Module):
    r"""How values of named columns, such as a drug and its dose, become the vector that is a condition.

    The parts of the columns stand one after another in the vector:

    - a **category** is one-hot among those that were trained on. Another one that the data have, as one that is held
      out, stands at their mean, :math:`1/K` in each entry: nothing is known of it;
    - an **embedding** is the vector that was given for the name, as it is;
    - a **number** is standardized, :math:`(x - m) / s` over the trained conditions; if none is negative and they span
      a factor of 10 or more, :math:`\log(1 + x / x_0)` is, with :math:`x_0` the smallest positive one.

    It is made by :class:`SamplesDataModule` and kept in the checkpoint of the map, which so takes names and numbers.

    Args:
        columns: What is known of each column: ``name``, ``kind`` (``"category"``, ``"embedding"``, ``"number"`` or
            ``"log"``), of a category the ``names`` that were trained on and the ``others`` that are known; of an
            embedding its ``names`` and their ``dim``; of numbers ``mean``, ``scale`` and ``unit``, the
            :math:`x_0`.
        trained: The combinations that were trained on: the texts of each column.

    Example:
        >>> from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
        >>> encoding = ConditionEncoding.fit(["drug", "dose"], ["category", "number"], [("A", "0"), ("B", "2")])
        >>> encoding.encode([("A", "0"), ("B", "1")])
        tensor([[ 1.,  0., -1.],
                [ 0.,  1.,  0.]])
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]], trained: Sequence[Texts] = ()) -> None:
        super().__init__()
        self.columns = [dict(column) for column in columns]
        self.trained = [tuple(texts) for texts in trained]
        for i, column in enumerate(self.columns):
            if column["kind"] == "embedding":
                self.register_buffer(f"vectors_{i}", torch.zeros(len(column["names"]), column["dim"]))

    @classmethod
    def fit(
        cls,
        names: Sequence[str],
        kinds: Sequence[str | None],
        trained: Sequence[Texts],
        *,
        others: Sequence[Texts] = (),
        embeddings: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    ) -> "ConditionEncoding":
        """Return the encoding of columns whose trained conditions are known.

        Args:
            names: Names of the columns.
            kinds: Kind of each; ``None`` for numbers of which the rule says how.
            trained: Texts of each column, of the conditions that are trained on.
            others: Those of further conditions, whose categories are known and not trained on.
            embeddings: Vectors by name, by column.
        """
        columns: list[dict[str, Any]] = []
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
            texts = [row[i] for row in trained]
            if embeddings and name in embeddings:
                table = embeddings[name]
                columns.append(
                    {"name": name, "kind": "embedding", "names": list(table), "dim": len(next(iter(table.values())))}
                )
            elif kind == "category":
                known = sorted(set(texts))
                further = sorted({row[i] for row in others} - set(known))
                columns.append({"name": name, "kind": "category", "names": known, "others": further})
            else:
                columns.append({"name": name, **_scaled(name, np.array(texts, dtype=np.float64), kind)})
        made = cls(columns, trained)
        for i, column in enumerate(columns):
            if column["kind"] == "embedding":
                table = (embeddings or {})[column["name"]]
                getattr(made, f"vectors_{i}").copy_(torch.tensor([list(table[name]) for name in column["names"]]))
        return made

    @property
    def hparams(self) -> dict[str, Any]:
        """Arguments that make an encoding of the same shapes, as plain Python, to load a ``state_dict`` into."""
        return {"columns": [dict(column) for column in self.columns], "trained": [list(row) for row in self.trained]}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(column["name"] for column in self.columns)

    @property
    def dim(self) -> int:
        """Dimension :math:`p` of the vectors."""
        return sum(_width(column) for column in self.columns)

    def extra_repr(self) -> str:
        """Return the columns, for ``print``."""
        return self.describe()

    def describe(self) -> str:
        """Return in words what becomes of each column."""
        return ", ".join(_described(column) for column in self.columns)

    def agrees_with(self, other: "ConditionEncoding") -> bool:
        """Return whether another encoding gives the same vectors."""
        if [_essence(column) for column in self.columns] != [_essence(column) for column in other.columns]:
            return False
        theirs = other.state_dict()
        return all(torch.allclose(theirs[name].to(mine), mine) for name, mine in self.state_dict().items())

    def note(self, trained: Iterable[Texts]) -> None:
        """Know of further combinations that were trained on."""
        self.trained += [tuple(row) for row in trained if tuple(row) not in self.trained]

    def encode(self, rows: Sequence[Sequence[str | Tensor]]) -> Tensor:
        """Return the ``(n, p)`` vectors of combinations, float32 on the CPU.

        Args:
            rows: Of each combination the texts of the columns; of an embedding, a vector instead.

        Raises:
            ValueError: A category is not known, a text is no number, or a vector has another length.
        """
        parts = [self._part(i, [row[i] for row in rows]) for i in range(len(self.columns))]
        return torch.cat(parts, dim=1).float()

    def _part(self, i: int, values: Sequence[str | Tensor]) -> Tensor:
        column = self.columns[i]
        name, kind = column["name"], column["kind"]
        if kind in ("number", "log"):
            numbers = torch.tensor([_number(name, value) for value in values], dtype=torch.float64, device="cpu")
            if kind == "log":
                if bool((numbers < 0).any()):
                    raise ValueError(f"condition: {name}={float(numbers.min()):g} is negative, and its logarithm taken")
                numbers = (numbers / column["unit"]).log1p()
            scaled: Tensor = (numbers - column["mean"]) / column["scale"]
            return scaled[:, None].float()
        if kind == "category":
            known = column["names"]
            one_hot = torch.eye(len(known), device="cpu")
            mean = torch.full((len(known),), 1 / len(known), device="cpu")
            return torch.stack([self._category(column, value, one_hot, mean) for value in values])
        table: Tensor = getattr(self, f"vectors_{i}").detach().cpu().float()
        return torch.stack([self._embedded(column, value, table) for value in values])

    @staticmethod
    def _category(column: Mapping[str, Any], value: str | Tensor, one_hot: Tensor, mean: Tensor) -> Tensor:
        if value in column["names"]:
            place: int = column["names"].index(value)
            return one_hot[place]
        if value in column["others"]:
            return mean
        raise ValueError(
            f"condition: {column['name']} {value!r} is not known; the map was trained on {listed(column['names'], 12)}"
            ": of another one it can know by condition_embeddings only"
        )

    @staticmethod
    def _embedded(column: Mapping[str, Any], value: str | Tensor, table: Tensor) -> Tensor:
        if isinstance(value, Tensor):
            if value.shape != table.shape[1:] or not bool(value.isfinite().all()):
                raise ValueError(
                    f"condition: the vector of {column['name']} must be {table.shape[1]} finite numbers, got shape "
                    f"{tuple(value.shape)}"
                )
            return value.detach().cpu().float()
        if value in column["names"]:
            return table[column["names"].index(value)]
        raise ValueError(
            f"condition: {column['name']} {value!r} has no vector in condition_embeddings, where there is "
            f"{listed(column['names'], 12)}: give its vector, as in {{{column['name']!r}: vector}}"
        )

    def remarks(self, rows: Sequence[Sequence[str | Tensor]]) -> list[str]:
        """Return what is to be said of combinations that were not trained on, at most one remark of each kind."""
        if not self.trained:
            return []
        texts = [i for i, column in enumerate(self.columns) if column["kind"] in ("category", "embedding")]
        numbers = [i for i in range(len(self.columns)) if i not in texts]
        together: dict[tuple[str, ...], list[Texts]] = {}
        for row in self.trained:
            together.setdefault(tuple(row[i] for i in texts), []).append(row)
        said: dict[str, str] = {}
        for asked in rows:
            unseen = [i for i in texts if all(row[i] != asked[i] for row in self.trained)]
            for i in unseen:
                said.setdefault(f"unseen {i}", self._of_unseen(i, asked[i]))
            mine = tuple(str(asked[i]) for i in texts)
            if not unseen and mine not in together:
                said.setdefault(
                    "combination",
                    f"{_listed_values(self.names, texts, mine)} were not trained on together: the images under this "
                    "combination are what the map makes of its parts",
                )
            for i in numbers:
                here = [float(row[i]) for row in together.get(mine, self.trained)]
                remark = self._of_number(i, _number(self.names[i], asked[i]), here, mine if mine in together else ())
                if remark is not None:
                    said.setdefault(f"number {i}", remark)
        return list(said.values())

    def _of_unseen(self, i: int, value: str | Tensor) -> str:
        column = self.columns[i]
        called = "a vector" if isinstance(value, Tensor) else repr(value)
        how = "the mean of the trained ones" if column["kind"] == "category" else "its vector"
        return f"the map was not trained on {column['name']} {called}: {how} stands for it"

    def _of_number(self, i: int, value: float, trained: Sequence[float], of: Sequence[str]) -> str | None:
        """Say where a number is further outside of the trained ones than half their range."""
        least, greatest = min(trained), max(trained)
        low, high, at = (_on_scale(self.columns[i], number) for number in (least, greatest, max(value, 0)))
        if self.columns[i]["kind"] != "log":
            at = value
        margin = (high - low) / 2 + 1e-6 * max(abs(low), abs(high))
        if low - margin <= at <= high + margin:
            return None
        under = f" under {name_of(of)}" if of else ""
        was = f"at {least:.6g} only" if least == greatest else f"from {least:.6g} to {greatest:.6g}"
        return (
            f"{self.names[i]}={value:.6g}, and the map was trained{under} {was}: so far outside its images mean little"
        )

    def asked(self, rows: Sequence[Sequence[str | Tensor]]) -> Tensor:
        """Return the vectors of combinations that a user asks for, and warn of those that were not trained on."""
        vectors = self.encode(rows)
        for remark in self.remarks(rows):
            rank_zero_warn(remark)
        return vectors


def _width(column: Mapping[str, Any]) -> int:
    widths: dict[str, int] = {"category": len(column.get("names", ())), "embedding": column.get("dim", 0)}
    return widths.get(column["kind"], 1)


def _essence(column: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 9) if isinstance(value, float) else value for key, value in column.items() if key != "others"
    }


def _scaled(name: str, numbers: Any, kind: str | None) -> dict[str, Any]:
    positive = numbers[numbers > 0]
    if kind is None:
        spread = len(positive) and not (numbers < 0).any() and positive.max() >= _DECADE * positive.min()
        kind = "log" if spread else "number"
    if kind == "log" and ((numbers < 0).any() or not len(positive)):
        raise ValueError(f"condition_key[{name!r}]='log' is for numbers that are not negative, and not all 0")
    unit = float(positive.min()) if kind == "log" else 1.0
    scaled = np.log1p(numbers / unit) if kind == "log" else numbers
    deviation = float(scaled.std())
    constant = deviation <= 1e-12 * max(1.0, float(np.abs(scaled).max()))
    return {"kind": kind, "unit": unit, "mean": float(scaled.mean()), "scale": 1.0 if constant else deviation}


def _on_scale(column: Mapping[str, Any], number: float) -> float:
    return float(np.log1p(number / column["unit"])) if column["kind"] == "log" else number


def _described(column: Mapping[str, Any]) -> str:
    name, kind = column["name"], column["kind"]
    if kind == "category":
        return f"{name} (one of {len(column['names'])} categories)"
    if kind == "embedding":
        return f"{name} (embedding of dimension {column['dim']})"
    formula = name if kind == "number" else f"log(1 + {name} / {column['unit']:g})"
    return f"{name} ({formula}, standardized)"


def _listed_values(names: Sequence[str], places: Sequence[int], values: Sequence[str]) -> str:
    return " and ".join(f"{names[i]} {value!r}" for i, value in zip(places, values, strict=True))


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"condition: {name} must be a number, got {value!r}") from None
    if not np.isfinite(number):
        raise ValueError(f"condition: {name} must be finite, got {value!r}")
    return number
