"""The epsilons of a map's training: decided once, plain numbers from then on, which its checkpoints keep."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_gap.checks import check_number
from lightning_gap.monge.border import on_device
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.epsilon import Epsilon, Weighted
from lightning_gap.monge.ot.priority_sampling import few_of
from lightning_gap.monge.schedules import counts
from lightning_gap.trainer.strategy import from_rank_zero

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["KeptEpsilons", "given_epsilon"]

FITTING, GAP, STARTED = "fitting_epsilon", "gap_epsilon", "started"


class KeptEpsilons:
    """Both epsilons of a map, and whether it has started, as numbers on the host.

    Buffers, which every strategy's checkpoints hold, are read when a run is set up or a state is loaded. In between the
    numbers go before: callbacks that average weights average buffers too, and exchange them in validation.
    """

    def __init__(self, model: "MongeMap", fitting: Epsilon, gap: Epsilon) -> None:
        self.given: Mapping[str, Epsilon] = {FITTING: fitting, GAP: gap}
        self._model = model
        for name, epsilon in self.given.items():
            number = math.nan if epsilon.absolute is None else epsilon.absolute
            model.register_buffer(name, torch.tensor(number))
        model.register_buffer(STARTED, torch.zeros(()))  # a number, for callbacks that average buffers
        nn.Module.register_load_state_dict_post_hook(model, self._loaded)
        self.read()

    def _loaded(self, module: nn.Module, incompatible: Any) -> None:
        self.read()

    def read(self) -> None:
        """Take the buffers' values."""
        self._numbers = {name: float(getattr(self._model, name)) for name in (FITTING, GAP, STARTED)}

    def restore(self) -> None:
        """Give the buffers their values back, after averages were copied over them."""
        for name, number in self._numbers.items():
            getattr(self._model, name).fill_(number)

    def write_to(self, state: MutableMapping[str, Any]) -> None:
        """Give the entries of a state dictionary, which may be that of an average, the values."""
        for name, number in self._numbers.items():
            if name in state:
                state[name] = torch.full_like(state[name], number)

    @property
    def fitting(self) -> float | None:
        """That of the fitting loss; ``None`` where it has not been decided."""
        return self._decided(FITTING)

    @property
    def gap(self) -> float | None:
        """That of the gap, likewise."""
        return self._decided(GAP)

    @property
    def started(self) -> bool:
        """Whether the map has taken its start from the samples."""
        return bool(self._numbers[STARTED])

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be decided."""
        return self.started and None not in (self.fitting, self.gap)

    def annealed(self, factor: float) -> dict[str, float | None]:
        """Return both as arguments of an objective, multiplied by a factor."""
        return {name: None if (e := self._decided(name)) is None else e * factor for name in (FITTING, GAP)}

    def start(self) -> None:
        """Note that the map has taken its start."""
        self._keep(STARTED, 1.0)

    def decide(self, pairs: Sequence[tuple[Weighted, Weighted]], *, again: bool) -> None:
        """Decide what was not given as shares of the typical costs between the samples of each pair.

        Once, so that the loss does not change under the optimizer's feet: what has been decided is only compared, where
        these are all training samples (``again``) and not a batch, and what differs is warned of.
        """
        if all(epsilon.absolute is not None for epsilon in self.given.values()):
            return
        model, objective = self._model, self._model.objective
        by_fit = objective.fitting_loss == "sinkhorn" or objective.reweight
        pairs = few_of(pairs, partial(on_device, model))
        kept = []
        for name, needed, cost, sets in (
            (FITTING, by_fit, objective.fitting_cost, [(y, y) for _, y in pairs]),
            (GAP, counts(model.gap_weight), objective.cost, pairs),
        ):
            before = self._decided(name)
            if self.given[name].absolute is not None or (before is not None and not again):
                continue
            try:
                value = from_rank_zero(model.trainer, self.given[name].resolve(cost, *sets))
            except ValueError as error:
                if needed and before is None:
                    where = "the training samples" if again else "the first training batch"
                    raise ValueError(f"{name} cannot be decided from {where}: {error}, {name}=...") from error
                continue
            if before is None:
                self._keep(name, value)
            elif not 0.9 < before / value < 1.1:
                kept.append(f"{name}={before:.3g}, which would be {value:.3g} by these samples")
        if kept:
            rank_zero_warn(
                f"MongeMap goes on from an earlier fit on other samples, with its start and {', '.join(kept)}: "
                "make a new MongeMap for other samples, or give the epsilons"
            )

    def _decided(self, name: str) -> float | None:
        number = self._numbers[name]
        return number if math.isfinite(number) else None

    def _keep(self, name: str, value: float) -> None:
        buffer: Tensor = getattr(self._model, name)
        # As a checkpoint holds it, so that a run that goes on from one takes the same number.
        self._numbers[name] = float(buffer.fill_(value))


def given_epsilon(name: str, absolute: float | None, share: float) -> Epsilon:
    """Return what was given for an epsilon."""
    check_number(f"relative_{name}", share, above=0)
    return Epsilon(check_epsilon(name, absolute), float(share), "typical")
