"""Schedules as scripts write them for a given length: of torch, Hugging Face, timm, and of their own."""

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import SWALR

RATE = 1e-3


class Length(NamedTuple):
    """What a script knows of its length, in the steps that the scheduler counts: all, or by epochs."""

    total: int
    epochs: int | None = None
    per_epoch: int = 1

    @property
    def warmup(self) -> int:
        return max(1, self.total // 10)


def warmup_sequential(o: Optimizer, n: Length) -> LRScheduler:
    warmup = torch_schedulers.LinearLR(o, start_factor=0.1, total_iters=n.warmup)
    cosine = torch_schedulers.CosineAnnealingLR(o, T_max=n.total - n.warmup)
    return torch_schedulers.SequentialLR(o, [warmup, cosine], milestones=[n.warmup])


def warmup_chained(o: Optimizer, n: Length) -> LRScheduler:
    warmup = torch_schedulers.LinearLR(o, start_factor=0.1, total_iters=n.warmup)
    return torch_schedulers.ChainedScheduler([warmup, torch_schedulers.PolynomialLR(o, total_iters=n.total)])


def warmup_lambda(o: Optimizer, n: Length) -> LRScheduler:
    total, warmup = n.total, n.warmup

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return LambdaLR(o, rate)


def one_cycle(o: Optimizer, n: Length) -> LRScheduler:
    if n.epochs is None:
        return torch_schedulers.OneCycleLR(o, max_lr=10 * RATE, total_steps=n.total)
    return torch_schedulers.OneCycleLR(o, max_lr=10 * RATE, epochs=n.epochs, steps_per_epoch=n.per_epoch)


def cyclic(o: Optimizer, n: Length) -> LRScheduler:
    return torch_schedulers.CyclicLR(o, RATE / 10, RATE, step_size_up=max(1, n.total // 4), mode="triangular2")


TORCH: dict[str, Callable[[Optimizer, Length], Any]] = {
    "StepLR": lambda o, n: torch_schedulers.StepLR(o, step_size=n.total // 3, gamma=0.3),
    "MultiStepLR": lambda o, n: torch_schedulers.MultiStepLR(o, [n.total // 2, n.total * 3 // 4]),
    "ExponentialLR": lambda o, n: torch_schedulers.ExponentialLR(o, gamma=0.01 ** (1 / n.total)),
    "CosineAnnealingLR": lambda o, n: torch_schedulers.CosineAnnealingLR(o, T_max=n.total, eta_min=RATE / 100),
    "CosineAnnealingWarmRestarts": lambda o, n: torch_schedulers.CosineAnnealingWarmRestarts(
        o, T_0=n.total // 3, T_mult=2
    ),
    "LinearLR": lambda o, n: torch_schedulers.LinearLR(o, start_factor=0.2, total_iters=n.total * 2 // 3),
    "ConstantLR": lambda o, n: torch_schedulers.ConstantLR(o, factor=0.2, total_iters=n.total // 2),
    "PolynomialLR": lambda o, n: torch_schedulers.PolynomialLR(o, total_iters=n.total, power=2.0),
    "LambdaLR": lambda o, n: LambdaLR(o, lambda step: max(0.0, 1 - step / n.total)),
    "MultiplicativeLR": lambda o, n: torch_schedulers.MultiplicativeLR(o, lambda step: 0.01 ** (1 / n.total)),
    "CyclicLR": cyclic,
    "OneCycleLR": one_cycle,
    "SequentialLR": warmup_sequential,
    "ChainedScheduler": warmup_chained,
    "SWALR": lambda o, n: SWALR(o, swa_lr=RATE / 2, anneal_epochs=n.total // 2),
    "warm-up and cosine by LambdaLR": warmup_lambda,
}


def linear_decay(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    if step < num_warmup_steps:
        return step / num_warmup_steps
    return max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))


class WarmupCosine(LRScheduler):
    """A scheduler of a project's own, with lengths under names of its own."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int, max_steps: int) -> None:
        self.warmup_steps, self.max_steps = warmup_steps, max_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < self.warmup_steps:
            factor = (self.last_epoch + 1) / self.warmup_steps
        else:
            done = (self.last_epoch - self.warmup_steps) / (self.max_steps - self.warmup_steps)
            factor = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return [rate * factor for rate in self.base_lrs]


class Decay:
    """A line to 0, as an object that can be called, or whose method can."""

    def __init__(self, total: int) -> None:
        self.total = total

    def rate(self, step: int) -> float:
        return max(0.0, 1 - step / self.total)

    __call__ = rate


def of_settings(o: Optimizer, settings: dict[str, dict[str, int]]) -> LRScheduler:
    def rate(step: int) -> float:
        schedule = settings["schedule"]
        return linear_decay(step, num_warmup_steps=schedule["warmup"], num_training_steps=schedule["total"])

    return LambdaLR(o, lambda step: 0.1 + 0.9 * rate(step))


class Numbered:
    """A scheduler that is told the number of the epoch or update, as timm's are: no LRScheduler of torch."""

    def __init__(self, optimizer: Optimizer, t_initial: int, *, by_epochs: bool) -> None:
        self.optimizer, self.t_initial, self.by_epochs = optimizer, t_initial, by_epochs
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_values = [group["initial_lr"] for group in optimizer.param_groups]
        self._set(0)

    def _set(self, t: int) -> None:
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, t / self.t_initial)))
        for group, base in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"] = base * share

    def step(self, epoch: int, metric: float | None = None) -> None:
        if self.by_epochs:
            self._set(epoch)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        if not self.by_epochs:
            self._set(num_updates)

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


OWN: dict[str, Callable[[Optimizer, Length], Any]] = {
    "LambdaLR of a partial": lambda o, n: LambdaLR(
        o, partial(linear_decay, num_warmup_steps=n.warmup, num_training_steps=n.total)
    ),
    "LambdaLR of a method": lambda o, n: LambdaLR(o, Decay(n.total).rate),
    "LambdaLR of an object": lambda o, n: LambdaLR(o, Decay(n.total)),
    "LambdaLR of settings": lambda o, n: of_settings(o, {"schedule": {"warmup": n.warmup, "total": n.total}}),
    "a subclass of LRScheduler": lambda o, n: WarmupCosine(o, n.warmup, n.total),
    "CosineAnnealingLR, lr_scheduler_step overridden": TORCH["CosineAnnealingLR"],
    "told the epoch or update": lambda o, n: Numbered(o, n.total, by_epochs=n.epochs is None and n.per_epoch == 0),
}


def hugging_face() -> dict[str, Callable[[Optimizer, Length], Any]]:
    if find_spec("transformers") is None:
        return {}
    from transformers import optimization as hf

    def of(name: str, *, ends: bool = True, **options: Any) -> Callable[[Optimizer, Length], Any]:
        def build(o: Optimizer, n: Length) -> Any:
            total = {"num_training_steps": n.total} if ends else {}
            return getattr(hf, name)(o, num_warmup_steps=n.warmup, **total, **options)

        return build

    return {
        "get_constant_schedule_with_warmup": of("get_constant_schedule_with_warmup", ends=False),
        "get_linear_schedule_with_warmup": of("get_linear_schedule_with_warmup"),
        "get_cosine_schedule_with_warmup": of("get_cosine_schedule_with_warmup"),
        "get_cosine_with_hard_restarts_schedule_with_warmup": of(
            "get_cosine_with_hard_restarts_schedule_with_warmup", num_cycles=2
        ),
        "get_polynomial_decay_schedule_with_warmup": of(
            "get_polynomial_decay_schedule_with_warmup", power=2.0, lr_end=RATE / 1000
        ),
        "get_inverse_sqrt_schedule": of("get_inverse_sqrt_schedule", ends=False),
    }


def timm() -> dict[str, Callable[[Optimizer, Length], Any]]:
    if find_spec("timm") is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedulers = import_module("timm.scheduler")

    def of(name: str, **lengths: Callable[[Length], Any]) -> Callable[[Optimizer, Length], Any]:
        def build(o: Optimizer, n: Length) -> Any:
            options = {key: value(n) for key, value in lengths.items()}
            return getattr(schedulers, name)(o, **options, t_in_epochs=n.per_epoch == 0)

        return build

    return {
        "timm.CosineLRScheduler": of(
            "CosineLRScheduler",
            t_initial=lambda n: n.total,
            warmup_t=lambda n: n.warmup,
            warmup_lr_init=lambda n: RATE / 10,
            lr_min=lambda n: RATE / 100,
        ),
        "timm.StepLRScheduler": of("StepLRScheduler", decay_t=lambda n: n.total // 3, decay_rate=lambda n: 0.3),
        "timm.MultiStepLRScheduler": of(
            "MultiStepLRScheduler", decay_t=lambda n: [n.total // 2, n.total * 3 // 4], decay_rate=lambda n: 0.1
        ),
        "timm.PolyLRScheduler": of("PolyLRScheduler", t_initial=lambda n: n.total, lr_min=lambda n: RATE / 100),
        "timm.TanhLRScheduler": of("TanhLRScheduler", t_initial=lambda n: n.total, lr_min=lambda n: RATE / 100),
    }


# Schedules that read their length again at every step.
LAZY: dict[str, Callable[[Optimizer, Callable[[], int]], Any]] = {
    "LambdaLR": lambda o, total: LambdaLR(o, lambda step: max(0.0, 1 - step / total())),
    "MultiplicativeLR": lambda o, total: torch_schedulers.MultiplicativeLR(o, lambda step: 0.01 ** (1 / total())),
}


@cache
def schedulers() -> dict[str, Callable[[Optimizer, Length], Any]]:
    """All schedules, of the libraries that are installed."""
    return {**TORCH, **OWN, **hugging_face(), **timm()}


def numbered(name: str) -> bool:
    """Whether a scheduler must be told the epoch or the update, by ``lr_scheduler_step``."""
    return name.startswith("timm.") or name == "told the epoch or update"
