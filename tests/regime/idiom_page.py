"""The page that says what becomes of each idiom: docs/schedules.md, of what ``regime_idioms.py`` has run."""

from collections.abc import Iterable
from pathlib import Path

from idiom_schedules import OWN, TORCH
from idiom_scripts import Outcome
from regime_idioms import IDIOMS, Cell

PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"
FAMILIES = ("torch", "your own functions and classes", "Hugging Face", "timm")
INTERVALS = {"epoch": "epochs", "step": "updates"}
Row = tuple[str, str]


def family(name: str) -> str:
    if name in TORCH:
        return FAMILIES[0]
    return FAMILIES[1] if name in OWN else FAMILIES[3 if name.startswith("timm.") else 2]


def words(found: Iterable[tuple[Cell, Outcome]]) -> dict[Row, dict[str, str]]:
    """Return what a row of the table says of each family: a word, of how many cells, and which schedulers differ."""
    rows: dict[Row, dict[str, list[tuple[str, str]]]] = {}
    for cell, outcome in found:
        rows.setdefault((cell.idiom, cell.interval), {}).setdefault(family(cell.name), []).append(
            (outcome.word, cell.name)
        )
    return {row: {name: _words(row[0], of) for name, of in families.items()} for row, families in rows.items()}


def _words(idiom: str, of: list[tuple[str, str]]) -> str:
    usual = "equal" if IDIOMS[idiom].asks else "refused"
    others = sorted({name for word, name in of if word != usual})
    if not others:
        return usual
    return f"{usual} {sum(word == usual for word, _ in of)} of {len(of)}; not {', '.join(others)}"


def table(found: Iterable[tuple[Cell, Outcome]], *, asks: bool) -> str:
    """Return the table of the idioms that ask for their lengths, or of those that do not."""
    rows = [["the script's length", "stepped by", *FAMILIES], ["---"] * (2 + len(FAMILIES))]
    for (idiom, interval), of in words(found).items():
        if IDIOMS[idiom].asks == asks:
            rows.append([idiom, INTERVALS[interval], *(of.get(name, "–") for name in FAMILIES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read(page: str) -> dict[Row, dict[str, str]]:
    """Return what the page says, as :func:`words` does."""
    units = {unit: interval for interval, unit in INTERVALS.items()}
    lines = [[part.strip() for part in line.strip("|").split(" | ")] for line in page.splitlines() if line[:2] == "| "]
    return {(line[0], units[line[1]]): dict(zip(FAMILIES, line[2:], strict=True)) for line in lines if line[1] in units}


def page(ran: list[tuple[Cell, Outcome]], started: list[tuple[Cell, Outcome]]) -> str:
    """Return the page, of what was run to its end, and of what was started at real sizes."""
    return TEXT.format(
        asked=table([*ran, *started], asks=True),
        told=table(started, asks=False),
        cells=len(ran),
        equal=sum(outcome.word == "equal" for _, outcome in ran),
        schedulers=len({cell.name for cell, _ in ran}),
        error=max(outcome.error for _, outcome in ran if outcome.word == "equal"),
    )


TEXT = """\
<!-- Written by `python -m benchmarks.science.regime_idioms --write` from what it ran: tests/regime/idiom_page.py. -->

# Where a schedule's length comes from

Under `LargeBatchRegime` a script is the reference run. Wherever it asks for a length, in `setup` or in
`configure_optimizers`, it gets the reference run's. A length that it has computed from its own batch by itself is told
by its number, and refused before the first update.

Each cell is a script run twice by a real Trainer: at the reference batch without the callback, and at another batch
with it. "equal": as many updates as planned, and every learning rate is the factor times the reference run's, to 1e-6
of the largest. `python -m benchmarks.science.regime_idioms` made {cells} runs of {schedulers} schedulers, over
`train_longer` 0, 0.1, 0.5 and 1, ratios from 0.5 to 32, and
accumulation: {equal} are equal, the largest difference is {error:.0e}.

## Lengths that are asked for, or written down

{asked}

`lr_scheduler_step` may be overridden, as timm's schedulers need it: `scheduler.step(epoch=self.current_epoch)`, or
`scheduler.step_update(num_updates=self.global_step)` with `interval="step"`. While a scheduler is stepped, the two say
where the reference run is.

## Lengths that only their number tells

Nothing in a number says where it was computed. One that is this run's number of updates, or a usual part of it, and no
such part of the reference run's, is refused. At real sizes (3,668 to 60,000 samples, 12 to 782 updates an epoch), up to
the first batch:

{told}

The others are taken for the reference run's: a part of a part may be any number, a warm-up alone has no end, and at
the ratio 10 this run's updates are a tenth of the reference run's. Ask within `configure_optimizers`, and there is
nothing to guess:

```python
def configure_optimizers(self):
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
    updates = self.trainer.estimated_stepping_batches
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates)
    return {{"optimizer": optimizer, "lr_scheduler": {{"scheduler": scheduler, "interval": "step"}}}}
```

`stretch_schedulers=True` declares that all lengths are the reference run's, and refuses none; `False`, that all are
this run's.

## Resuming

`python -m benchmarks.science.regime_idioms --resume` cuts the run of each scheduler at twenty updates, by checkpoints
of `ModelCheckpoint(every_n_train_steps=1)`: at each share, by epochs and by updates, with and without accumulation,
with lengths that are written down or asked for. Resumed, its learning rates and weights are those of the run that was
not cut, bit for bit, where the loader goes on with its next batch (by `state_dict` and `load_state_dict`, as
torchdata's `StatefulDataLoader` does).
"""
