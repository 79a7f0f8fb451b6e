"""What the names of metrics tell."""

import re
from collections.abc import Sequence
from typing import Literal

from lightning_gap.dashboards.runs import Run

__all__ = ["DIFFUSION", "HELD_OUT", "MONGE", "REGIME", "TRAINING", "better", "result_metrics", "short"]

REGIME, DIFFUSION, MONGE = (f"lightning_gap/{room}/" for room in ("regime", "diffusion", "monge"))
HELD_OUT = re.compile(r"(?:^|[_/.-])(?:val|valid|validation|test|eval)(?:[_/.-]|$)|^(?:val|test)")
TRAINING = re.compile(r"(^|[_/.-])train(ing)?([_/.-]|$)")
# Words in the names of metrics, and whether more of it is better.
_MORE = re.compile(r"acc|auc|auroc|f1|precision|recall|r2|cosine|iou|dice|bleu|score|correlation")
_LESS = re.compile(r"loss|error|err\b|rmse|mse|mae|nll|perplexity|divergence|gap|distance|wasserstein|unexplained|fid")
# What is logged beside the metrics.
_BESIDE = re.compile(r"^(epoch|hp_metric|lr-.*|step)$")


def better(metric: str) -> Literal["max", "min"] | None:
    """Return whether more or less of a metric is better, by the words in its name; None where these do not tell.

    Args:
        metric: The key it is logged under.

    Example:
        >>> better("val_accuracy"), better("lightning_gap/monge/val_monge_gap"), better("val_temperature")
        ('max', 'min', None)
    """
    name = metric.rpartition("/")[2].lower()
    return "max" if _MORE.search(name) else "min" if _LESS.search(name) else None


def result_metrics(runs: Sequence[Run]) -> list[str]:
    """Return the metrics of the users' own modules: those on held-out data first, and then those with a best.

    Args:
        runs: The runs.
    """
    keys = {key for run in runs for key in run.metrics}
    own = [key for key in keys if not key.startswith("lightning_gap/") and not _BESIDE.match(key)]
    return sorted(own, key=lambda key: (not HELD_OUT.search(key), better(key) is None, better(key) != "max", key))


def short(key: str) -> str:
    """Return a key without the package's prefix."""
    return re.sub(r"^lightning_gap/\w+/", "", key)
