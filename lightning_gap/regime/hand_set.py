"""Learning rates that the user's code sets or steps past its schedulers, found in the source of its methods."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["changes_by_epoch", "check_hand_set_rates", "check_hand_stepped", "sets_rate"]

# A learning rate that is set, and one that is read.
_GROUP = r"param_groups\[[^\]]*\]|\b\w*(?:group|pg)\w*|\b[gp]"
_TO = (
    r"""(?:\[["']lr["']\](?:\s*=(?!=)|\.(?:fill_|copy_)\()|\.update\(\s*(?:\{\s*["']lr["']\s*:|lr\s*=))"""
    r"(?P<value>.*)"
)
_NAMES_GROUP = re.compile(r"\bfor\s+(\w+)\s+in\s+[^:]*param_groups")
_READS_RATE = re.compile(r"""\[["'](initial_)?lr["']\]""")
_CHANGES_RATE = re.compile(r"""\[["']lr["']\]\s*[*/]?=(?!=)""")
_NOT_THE_USERS = ("lightning.", "lightning_gap.", "torch.")


def check_hand_set_rates(trainer: Any, pl_module: LightningModule) -> None:
    """Refuse code that sets a learning rate past its schedulers, to a number of its own: it would not be scaled."""
    for place, source in _methods_of_users(trainer, pl_module):
        groups = _NAMES_GROUP.findall(source)
        for line in source.splitlines():
            if sets_rate(line, groups):
                raise MisconfigurationException(
                    f"LargeBatchRegime: {place} sets a learning rate to a number of its own "
                    f"({line.strip()}), which is not scaled. Use a scheduler, such as LinearLR for a warm-up, "
                    'change the rate by a factor, or pass lr_rule="none".'
                )


def sets_rate(line: str, groups: Iterable[str] = ()) -> bool:
    """Return whether a line of code sets a learning rate to a number of its own."""
    named = "|".join([_GROUP, *(rf"\b{group}" for group in groups)])
    found = re.search(rf"^[^#]*?(?:{named}){_TO}", line)
    return found is not None and not _READS_RATE.search(found["value"])


def changes_by_epoch(trainer: Any) -> list[str]:
    """Return the methods that change a learning rate in an epoch of their choice, which is one of this run."""
    methods = _methods_of_users(trainer, trainer.lightning_module)
    return [place for place, source in methods if "current_epoch" in source and _CHANGES_RATE.search(source)]


def check_hand_stepped(trainer: Any, pl_module: LightningModule) -> None:
    """Refuse code that steps schedulers beside Lightning, which does so by itself under automatic optimization."""
    for place, source in _methods_of_users(trainer, pl_module):
        if pl_module.automatic_optimization and "lr_schedulers(" in source and ".step(" in source:
            raise MisconfigurationException(
                f"LargeBatchRegime: {place} steps schedulers by itself, at epochs and updates of this run. Return them "
                'from configure_optimizers with their interval, "epoch" or "step", and leave the stepping to Lightning.'
            )


def _methods_of_users(trainer: Any, pl_module: LightningModule) -> Iterator[tuple[str, str]]:
    for owner in (pl_module, *trainer.callbacks):
        for kind in type(owner).__mro__:
            if kind.__module__.startswith(_NOT_THE_USERS) or kind is object:
                continue
            for name, method in vars(kind).items():
                if name != "configure_optimizers" and inspect.isfunction(method):
                    yield f"{kind.__name__}.{name}", _source(method)


def _source(method: Any) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):
        return ""
