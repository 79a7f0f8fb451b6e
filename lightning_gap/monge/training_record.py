"""What a map remembers of how it was made, for those who get it without its training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["RECORD", "TrainingRecord", "plain_scores"]

# Its place in a checkpoint.
RECORD = "lightning_gap_training_record"

# As loggers know them.
_PREFIX = "lightning_gap/monge/"


class TrainingRecord:
    """Sizes of the training samples and updates of the last fit, and the scores of the last validation and test."""

    def __init__(self) -> None:
        self.samples: list[int] | None = None
        self.updates = 0
        self._scores: dict[str, dict[str, float]] = {}

    def of_a_fit(self, data: Any) -> None:
        """Take the sizes of the samples that a fit is for, and forget the scores of the map as it was."""
        self.samples = None
        if hasattr(data, "training_pairs") and not getattr(data, "endless", False):
            pairs = data.training_pairs()
            # A side without labels is in the pair of every condition, and counts once.
            sides = ({id(pair[i].samples): len(pair[i].samples) for pair in pairs} for i in range(2))
            self.samples = [sum(side.values()) for side in sides]
        self._scores.clear()

    def note(self, stage: str, values: Mapping[str, Any]) -> None:
        """Keep the scores of a stage."""
        self._scores[stage] = plain_scores({f"{stage}_{name}": value for name, value in values.items()})

    @property
    def scores(self) -> dict[str, float]:
        """Those of the last test, and where there was none of the last validation."""
        return dict(self._scores.get("test") or self._scores.get("val") or {})

    def state(self) -> dict[str, Any]:
        """Return it as plain Python, as a checkpoint holds it."""
        scores = {stage: dict(found) for stage, found in self._scores.items()}
        return {"samples": self.samples, "updates": self.updates, "scores": scores}

    def load(self, found: Any) -> None:
        """Take what a checkpoint holds, which may be older or of anyone: numbers are taken, and no more."""
        if not isinstance(found, Mapping):
            return
        samples, updates, scores = (found.get(name) for name in ("samples", "updates", "scores"))
        sizes = isinstance(samples, Sequence) and len(samples) == 2 and all(type(size) is int for size in samples)
        self.samples = list(samples) if sizes else None  # type: ignore[arg-type]
        self.updates = updates if type(updates) is int else 0
        stages = scores if isinstance(scores, Mapping) else {}
        tables = {stage: stages[stage] for stage in ("val", "test") if isinstance(stages.get(stage), Mapping)}
        self._scores = {
            stage: plain_scores({name: value for name, value in table.items() if type(value) in (int, float)})
            for stage, table in tables.items()
        }


def plain_scores(values: Any) -> dict[str, float]:
    """Return the finite numbers of a table by their short names."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"scores must be numbers by name, got {type(values).__name__}: give what a test returns, "
            "as in scores=trainer.test(model, data)[0]"
        )
    numbers = {str(name).removeprefix(_PREFIX): float(value) for name, value in values.items()}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
