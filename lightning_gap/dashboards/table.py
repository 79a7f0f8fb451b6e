"""Tables of results: one value, shown alike in a terminal and in a report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

__all__ = ["Column", "ResultTable", "Row", "Value", "spread"]

Value = str | float | Sequence[float]


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation, 0 for a single value.

    Args:
        values: At least one number.

    Example:
        >>> spread([1.0, 3.0]), spread([2.0])
        (1.4142135623730951, 0.0)
    """
    return stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Column:
    """How the values of one column are written and which of them is the best.

    Args:
        name: Heading.
        digits: Decimals.
        best: ``"max"`` or ``"min"`` marks that mean in the column; ``None`` marks nothing.
        unit: Written after the heading, for example ``"%"``.
    """

    name: str
    digits: int = 2
    best: Literal["max", "min"] | None = None
    unit: str = ""

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True)
class Row:
    """One row: what it is called, its values in the order of the columns, and a short remark.

    Args:
        label: First cell.
        values: A text, a number, or the numbers of several seeds for each column.
        detail: Small print under the label.
    """

    label: str
    values: Sequence[Value]
    detail: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell as it is shown: the mean, the deviation over seeds (empty for one number), whether it is the best."""

    text: str
    deviation: str
    best: bool


@dataclass(frozen=True)
class ResultTable:
    """Results in rows and columns, numbers of several seeds as mean ± sample standard deviation.

    Args:
        title: Heading of the table.
        first: Heading of the column of labels.
        columns: All other columns.
        rows: The rows, best or not.
        caption: One or two sentences under the table.

    Raises:
        ValueError: If a row has not as many values as there are columns, or a value holds no number.

    Example:
        >>> table = ResultTable("Runs", "run", [Column("accuracy", 1, "max", "%")], [Row("a", [[97.0, 98.0]])])
        >>> table.cells()[0][0]
        Cell(text='97.5', deviation='0.7', best=True)
    """

    title: str
    first: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(f"row {row.label!r} has {len(row.values)} values for {len(self.columns)} columns")
            if any(not isinstance(value, str | float | int) and len(value) == 0 for value in row.values):
                raise ValueError(f"row {row.label!r} has a value without numbers: give at least one number or a text")

    def cells(self) -> list[list[Cell]]:
        """Return the cells row by row, without the labels. Means that read the same share the mark."""
        best = [self._best(i) for i in range(len(self.columns))]
        return [
            [
                self._cell(column, value, best[i])
                for i, (column, value) in enumerate(zip(self.columns, row.values, strict=True))
            ]
            for row in self.rows
        ]

    def _best(self, column: int) -> str | None:
        pick = self.columns[column].best
        means = [_mean(row.values[column]) for row in self.rows]
        numbers = [mean for mean in means if mean is not None]
        if pick is None or not numbers:
            return None
        return f"{(max if pick == 'max' else min)(numbers):,.{self.columns[column].digits}f}"

    @staticmethod
    def _cell(column: Column, value: Value, best: str | None) -> Cell:
        mean = _mean(value)
        if mean is None:
            return Cell(str(value), "", False)
        text = f"{mean:,.{column.digits}f}"
        numbers = [value] if isinstance(value, float | int) else [float(v) for v in value]
        deviation = f"{spread(numbers):,.{column.digits}f}" if len(numbers) > 1 else ""
        return Cell(text, deviation, text == best)

    def to_rich(self) -> "RichTable":
        """Return the table for a terminal, the best values in bold."""
        from rich.box import SIMPLE_HEAD
        from rich.cells import cell_len
        from rich.table import Table

        table = Table(title=self.title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        table.add_column(self.first)
        shown = [_rich_cells(cells) for cells in self.cells()]
        # Long labels and headings break into lines, numbers never do.
        longest = [max((cell_len(row[i].plain) for row in shown), default=0) for i in range(len(self.columns))]
        for i, column in enumerate(self.columns):
            table.add_column(column.heading, justify="right", min_width=longest[i])
        for row, texts in zip(self.rows, shown, strict=True):
            table.add_row(row.label, *texts)
        return table


def _mean(value: Value) -> float | None:
    if isinstance(value, str):
        return None
    return float(value) if isinstance(value, float | int) else fmean(value)


def _rich_cells(cells: Iterable[Cell]) -> "list[Text]":
    from rich.text import Text

    return [
        Text(f"{cell.text} ± {cell.deviation}" if cell.deviation else cell.text, "bold green" if cell.best else "")
        for cell in cells
    ]
