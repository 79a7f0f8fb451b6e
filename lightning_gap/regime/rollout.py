"""A schedule rolled out before the run: its learning rates over the reference run, and the lengths that it hides."""

import copy
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.rates import Rollout
from lightning_gap.regime.rules.hyperparameters import Rescaling
from lightning_gap.regime.scaling import scale_optimizer
from lightning_gap.regime.schedules import flattened, horizons, scale_scheduler

__all__ = [
    "follows_its_factor",
    "hidden_lengths",
    "optimizer_of",
    "roll_out",
    "turns",
]

# No look ahead takes longer, in seconds: some hundred thousand updates of a schedule by updates.
_PATIENCE = 4.0
_BLOCK = 256  # steps between two looks at the time
# What counts something else than steps.
_NO_LENGTHS = re.compile(
    "seed|power|cycles|cycle_|factor|mode|last_epoch|count|noise|decay$|decay_rate|gamma|dim|(?<!step_)size$|^_"
)
# Two rates are the same to this share of the highest.
_SAME = 1e-9


def roll_out(clock: ReferenceClock) -> Rollout:
    """Step a copy of a scheduler through the reference run; the scheduler and its optimizer are left as they are.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> linear = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 - step / 4)
        >>> roll_out(ReferenceClock(linear, "step", 1, 2, last=4)).rates
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> sgd.param_groups[0]["lr"]
        1.0
    """
    rates: list[float] = []
    own = _copied(clock)
    if own is None:
        return Rollout(rates, None, whole=False)
    try:
        for groups in _rates(own):
            rates.append(groups[0])
    except TimeoutError:
        return Rollout(rates, None, whole=False)
    except Exception as error:  # whatever a scheduler, or a user's lr_scheduler_step, raises
        return Rollout(rates, error, whole=True)
    return Rollout(rates, None, whole=True)


def follows_its_factor(clock: ReferenceClock, factor: float) -> bool | None:
    """Return whether a scheduler scales if all that are named as its rates do; ``None`` where it cannot be copied."""
    own, other = _copied(clock), _copied(clock)
    if own is None or other is None:
        return None
    rescaling = Rescaling(lr_factor=factor)
    scale_optimizer(other.scheduler.optimizer, rescaling)
    scale_scheduler(other.scheduler, rescaling)
    highest = 0.0
    try:
        for plain, scaled in zip(_rates(own), _rates(other), strict=True):
            highest = max(highest, *map(abs, plain), 1e-300)
            if any(abs(factor * a - b) > 1e-7 * factor * highest for a, b in zip(plain, scaled, strict=True)):
                return False
    except TimeoutError:
        pass
    return True


def _rates(clock: ReferenceClock) -> Iterator[list[float]]:
    """Step a scheduler through the reference run, and yield the rates of all groups after each step."""
    optimizer = clock.scheduler.optimizer
    yield _of_groups(optimizer)
    began = time.monotonic()
    last = clock.steps_until(clock.last or 0)
    for start in range(1, last + 1, _BLOCK):
        block: list[list[float]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a step without an update
            for number in range(start, min(start + _BLOCK, last + 1)):
                try:
                    clock.step_after(clock.reference_update_of(number))
                except Exception:
                    yield from block
                    raise
                block.append(_of_groups(optimizer))
        yield from block
        if time.monotonic() - began > _PATIENCE:
            raise TimeoutError


def _of_groups(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None] or [0.0]


def _copied(clock: ReferenceClock) -> ReferenceClock | None:
    """Return the clock of a copy of a scheduler, which steps a copy of its optimizer without state; None without."""
    optimizer: Any = optimizer_of(clock.scheduler)
    if optimizer is None:
        return None
    try:
        stand_in = copy.copy(optimizer)
        stand_in.defaults = dict(optimizer.defaults)
        stand_in.param_groups = [{key: _own(value) for key, value in group.items()} for group in optimizer.param_groups]
        return clock._replace(scheduler=copy.deepcopy(clock.scheduler, {id(optimizer): stand_in}))
    except Exception:  # whatever the parts of a scheduler raise that cannot be copied
        return None


def _own(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def turns(rates: list[float]) -> dict[str, int]:
    """Return after how many steps a schedule ends or turns: where it reaches 0, has its lowest, and stands still."""
    top = max(map(abs, rates), default=0.0)
    if len(rates) < 2 or top == 0:
        return {}
    lowest = min(range(len(rates)), key=rates.__getitem__)
    low = rates[lowest]
    last = next((at for at in range(len(rates) - 1, 0, -1) if abs(rates[at] - rates[at - 1]) > _SAME * top), 0)
    found = {}
    if 0 < last < len(rates) - 1 and rates[last] < rates[last - 1]:
        found["end"] = last
    elif 0 < lowest < len(rates) - 1 and max(rates[:lowest]) > 0.5 * top and max(rates[lowest:]) > 0.01 * top + low:
        found["lowest"] = lowest
    return found


def hidden_lengths(scheduler: Any) -> dict[str, int]:
    """Return the whole numbers that a scheduler, its parts and its functions hold, by where they are."""
    found: dict[str, int] = dict(horizons(scheduler)) if isinstance(scheduler, LRScheduler) else {}
    for part in flattened(scheduler):
        name = type(part).__name__
        for function in getattr(part, "lr_lambdas", ()):
            found |= {f"{name}: {key}": value for key, value in _whole_numbers(_held_by(function))}
        if not isinstance(part, LRScheduler) or not type(part).__module__.startswith("torch.optim."):
            found |= {f"{name}.{key}": value for key, value in _whole_numbers(vars(part).items())}
    return found


def _held_by(function: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(function, partial):
        return [
            *((str(at), value) for at, value in enumerate(function.args)),
            *function.keywords.items(),
            *_held_by(function.func),
        ]
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None:
        return list(getattr(function, "__dict__", {}).items())
    held = [
        (name, cell.cell_contents) for name, cell in zip(code.co_freevars, cells or (), strict=False) if _full(cell)
    ]
    names = code.co_varnames[: code.co_argcount]
    held += list(zip(reversed(names), reversed(function.__defaults__ or ()), strict=False))
    held += [(name, function.__globals__[name]) for name in code.co_names if name in function.__globals__]
    return held


def _full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # not yet set
        return False
    return True


def _whole_numbers(held: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int]]:
    for key, value in held:
        if _NO_LENGTHS.search(key):
            continue
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number > 1 and number % 1 == 0:
                yield key if number is value else f"{key}, {int(number)}", int(number)


def optimizer_of(scheduler: Any) -> Optimizer | None:
    """Return the optimizer whose rates a scheduler sets; ``None`` where it has none."""
    optimizer = getattr(scheduler, "optimizer", None)
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
