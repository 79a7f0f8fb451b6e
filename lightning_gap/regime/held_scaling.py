"""Hyperparameters that follow a batch which changes, under schedulers that know the reference run's alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.optim import Optimizer

from lightning_gap.trainer.internals.of_torch import times_written

__all__ = ["HeldScaling", "ScaledAt", "warn_of_others"]

# From an optimizer, a group of its reference run and the ratio: the hyperparameters that change, with their values.
ScaledAt = Callable[[Optimizer, Mapping[str, Any], float], Mapping[str, Any]]
# A group's hyperparameters that a scheduler may move or a rule may scale.
_KEYS = ("lr", "weight_decay", "betas", "momentum", "alpha", "eps", "rho")


class HeldScaling:
    r"""Holds the reference run's hyperparameters of optimizers, and those of the present batch in their groups.

    In a group there is :math:`\eta' = \eta f(\kappa)`, which optimizer, monitors and loggers read. While a scheduler
    steps it is the reference run's again, so any scheduler does what it does there. What somebody else changes in
    between, as ``ReduceLROnPlateau`` does by its factor, is taken over as the same share of the reference run's.

    Args:
        optimizers: Whose groups are held.
        scaled_at: The rules.
        changed: Is told the name of a hyperparameter that somebody else has changed, and of a group's "params".

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> halving = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
        >>> held = HeldScaling([sgd], lambda optimizer, group, ratio: {"lr": group["lr"] * ratio**0.5})
        >>> held.put(16.0)
        >>> sgd.param_groups[0]["lr"]
        2.0
        >>> sgd.step()
        >>> with held.reference_run():
        ...     halving.step()
        >>> sgd.param_groups[0]["lr"]
        1.0
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], scaled_at: ScaledAt, changed: Callable[[str], None] = lambda key: None
    ) -> None:
        self._optimizers, self._scaled_at, self._told = list(optimizers), scaled_at, changed
        self.ratio = 1.0
        self._reference: dict[int, dict[str, Any]] = {}  # by the group: an optimizer may get more of them
        self._written: dict[int, dict[str, Any]] = {}  # what tells whether somebody else has written since
        self._values: dict[int, dict[str, Any]] = {}  # that were put in the place of the reference run's
        self.take()

    def _groups(self) -> list[tuple[Optimizer, dict[str, Any]]]:
        return [(optimizer, group) for optimizer in self._optimizers for group in optimizer.param_groups]

    def take(self) -> None:
        """Take what is in the groups for the reference run's."""
        self._reference = {id(group): _values(group) for _, group in self._groups()}
        self._written, self._values = {}, {}

    def put(self, ratio: float) -> None:
        """Put the hyperparameters of a batch of some ratio into the groups.

        Args:
            ratio: The batch over the reference run's.
        """
        added = [group for _, group in self._groups() if id(group) not in self._reference]
        if added and self._reference:
            self._told("params")
        if self._written and ratio == self.ratio and not added:
            return  # what somebody else has changed meanwhile is in force, and taken over when something changes here
        self.give_back()
        self.ratio = ratio
        for optimizer, group in self._groups():
            reference = self._reference.setdefault(id(group), _values(group))
            told = {} if ratio == 1.0 else self._scaled_at(optimizer, {**group, **reference}, ratio)
            values = {key: value for key, value in told.items() if key in _KEYS}  # the others are the scheduler's
            self._values[id(group)] = {key: _kept(value) for key, value in values.items()}
            for key, value in values.items():
                _write(group, key, value)
            self._written[id(group)] = _marks(group)

    def give_back(self) -> None:
        """Put the reference run's into the groups, with what others have changed meanwhile."""
        for _, group in self._groups():
            reference, written = self._reference.get(id(group)), self._written.get(id(group))
            if reference is None or written is None:
                continue
            scaled = self._values.get(id(group), {})
            for key, mark in _marks(group).items():
                if mark != written.get(key):  # somebody else's, such as a plateau's
                    self._told(key)
                    reference[key] = _taken_over(reference.get(key), scaled.get(key), _kept(group[key]))
                if key in scaled or mark != written.get(key):
                    _write(group, key, reference[key])
        self._written, self._values = {}, {}

    def reference_run(self) -> "_ReferenceRun":
        """Return a context in which the groups are the reference run's; what changes there is the reference run's."""
        return _ReferenceRun(self)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the reference run's hyperparameters of each group, as plain Python."""
        saved = [self._reference.get(id(group), _values(group)) for _, group in self._groups()]
        return [{key: _plain(value) for key, value in values.items()} for values in saved]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]], ratio: float) -> None:
        """Take up what a checkpoint left, whose groups are as large as its batch.

        Args:
            state: What :meth:`state_dict` returned.
            ratio: Of the batch then.
        """
        for (_, group), values in zip(self._groups(), state, strict=False):
            reference = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            self._reference[id(group)] = reference
            for key, value in reference.items():
                if key in group:
                    _write(group, key, value)
        self._written, self._values = {}, {}
        self.put(ratio)


class _ReferenceRun:
    def __init__(self, held: HeldScaling) -> None:
        self._held = held

    def __enter__(self) -> None:
        self._held.give_back()

    def __exit__(self, *error: object) -> None:
        self._held.take()
        self._held.put(self._held.ratio)


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _kept(group[key]) for key in _KEYS if key in group}


def _kept(value: Any) -> Any:
    """Return a value that stays what it is: a tensor may be written in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _marks(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes where somebody writes to a group, without waiting for a tensor's device."""
    return {key: _mark(group[key]) for key in _KEYS if key in group}


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), times_written(value)
    return tuple(map(_mark, value)) if isinstance(value, (tuple, list)) else value


def _taken_over(reference: Any, before: Any, now: Any) -> Any:
    """Return the reference run's value where somebody has put ``now`` in the place of ``before``."""
    numbers = (int, float, Tensor)
    if before is None or not all(isinstance(each, numbers) for each in (reference, before, now)):
        return now
    if not isinstance(before, Tensor) and before == 0:
        return now
    return reference * (now / before)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, Tensor) else value


def _write(group: dict[str, Any], key: str, value: Any) -> None:
    """Put a value where a tensor is kept, for compiled and captured steps read that one."""
    kept = group.get(key)
    if isinstance(kept, Tensor):
        kept.copy_(value) if isinstance(value, Tensor) else kept.fill_(value)
    elif isinstance(kept, tuple) and any(isinstance(each, Tensor) for each in kept):
        for old, new in zip(kept, value, strict=True):
            old.fill_(float(new)) if isinstance(old, Tensor) else None
    else:
        group[key] = value


_warnings = WarningCache()


def warn_of_others(key: str) -> None:
    """Warn, once, of what somebody else does to the groups of an optimizer."""
    if key == "params":
        _warnings.warn(
            "BatchSizeSchedule: a parameter group was added. Its rate is taken for the reference run's, and scaled by "
            "the batch that runs."
        )
    else:
        _warnings.warn(
            f"BatchSizeSchedule: somebody else than a scheduler changes {key!r} of the optimizer. What is put there is "
            "taken for the value of the batch that runs. Use a scheduler, which is stepped by samples."
        )
