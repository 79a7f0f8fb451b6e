"""Which gradients over a smaller batch a run measures: chosen from what it has, or refused with the remedy."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gap.ranks.group import mean_over_ranks
from lightning_gap.regime.dual_norms import DualNoiseScaleEstimate
from lightning_gap.regime.micro_batches import MicroBatchGradients
from lightning_gap.regime.noise_scale import NoiseScaleEstimate, gradient_moments
from lightning_gap.regime.noise_sources.dual_gradients import DualNormGradients
from lightning_gap.regime.noise_sources.example_gradients import ExampleGradients, check_hearable
from lightning_gap.regime.noise_sources.optimizer_norms import NoiseNorm, common_norm, parameter_norms
from lightning_gap.regime.sample_noise import mixing_layers

__all__ = ["Estimate", "NoiseSource", "Source", "Window", "ghosts_of", "source_of"]

NoiseSource = Literal["auto", "examples", "ghosts", "accumulation", "replicas"]

_ACCUMULATE = "use accumulate_grad_batches of 2 or more with as much smaller batches, or several replicas"


Estimate = NoiseScaleEstimate | DualNoiseScaleEstimate


@dataclass(frozen=True)
class Window:
    """How the gradients of an update came about.

    Args:
        micro_batches: On each replica.
        division: By what each micro-batch's loss was divided.
        scale: By what it was multiplied in half precision; what is in ``.grad`` now is not.
        replicas: Whose gradients have been averaged.
    """

    micro_batches: int
    division: int
    scale: Tensor
    replicas: int


class Source(ABC):
    """What hears gradients over a smaller batch than the update's, as it is accumulated."""

    norm = "euclidean"

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    @property
    def small_batch(self) -> float:
        """The samples of the smaller batch."""
        return self.micro_batch

    @property
    def unmeasured(self) -> Mapping[str, str]:
        """The parameters that are left out, by name, with the reason."""
        return {}

    @abstractmethod
    def check(self, model: nn.Module, *, compiled: bool = False) -> None:
        """Raise ValueError where a model, or one that is compiled whole, cannot be heard."""

    @abstractmethod
    def pause(self) -> None:
        """Forget the update that is heard."""

    @abstractmethod
    def listen(self, model: nn.Module, parameters: Sequence[Tensor], seed: int) -> None:
        """Start to hear an update, which a seed names; raise ValueError where the model cannot be heard."""

    def squares(self) -> tuple[Tensor, Tensor, int] | None:
        """Return the sum of the smaller batches' squares, the square of what is in ``.grad``, and their number."""
        return None

    def new_estimate(self, decay: float) -> Estimate:
        """Return averages of nothing yet, for what :meth:`measure` returns."""
        return NoiseScaleEstimate(decay)

    def measure(self, window: Window) -> tuple[float, ...] | None:
        """Stop to hear, and return one measurement for the estimate; None if nothing was heard."""
        heard = self.squares()
        whole = self.micro_batch * window.micro_batches * window.replicas
        if heard is None or whole <= self.small_batch:
            return None
        small, big, parts = heard
        small = mean_over_ranks(small) * window.division**2 / parts
        numbers = torch.stack((small, big.to(small), window.scale.to(small)))
        small_square, big_square, scale = numbers.tolist()  # the only wait for the device
        return gradient_moments(
            small_square / scale**2,
            big_square * (window.division / window.micro_batches) ** 2,
            self.small_batch,
            whole,
        )

    @abstractmethod
    def remove(self) -> None:
        """Stop to hear."""


class MicroBatches(Source):
    """The micro-batches of an update, of accumulation or of replicas."""

    def __init__(self, micro_batch: int) -> None:
        super().__init__(micro_batch)
        self._gradients = MicroBatchGradients()

    def check(self, model: nn.Module, *, compiled: bool = False) -> None:
        pass  # parameters' own hooks hear whatever there is

    def pause(self) -> None:
        self._gradients.squares()

    def listen(self, model: nn.Module, parameters: Sequence[Tensor], seed: int) -> None:
        self._gradients.listen(parameters)

    def squares(self) -> tuple[Tensor, Tensor, int] | None:
        return self._gradients.squares()

    def remove(self) -> None:
        self._gradients.remove()


class DualNorms(Source):
    """The micro-batches of an update, in the norms of its optimizers."""

    def __init__(self, micro_batch: int, norm: NoiseNorm, optimizers: Sequence[Optimizer]) -> None:
        super().__init__(micro_batch)
        self._gradients, self._asked, self._optimizers = DualNormGradients(), norm, optimizers
        self.norm = common_norm(parameter_norms(optimizers, norm))

    def new_estimate(self, decay: float) -> Estimate:
        return DualNoiseScaleEstimate(decay, self.norm)

    def check(self, model: nn.Module, *, compiled: bool = False) -> None:
        pass  # parameters' own hooks hear whatever there is

    def pause(self) -> None:
        self._gradients.pause()

    def listen(self, model: nn.Module, parameters: Sequence[Tensor], seed: int) -> None:
        self._gradients.listen(self._optimizers, self._asked)

    def measure(self, window: Window) -> tuple[float, ...] | None:
        if window.micro_batches * window.replicas < 2:
            self.pause()  # an incomplete last window of one
            return None
        found = self._gradients.norms(
            self.micro_batch,
            factor=window.division / window.scale,
            mean_factor=window.division / window.micro_batches,
            micro_batches=window.micro_batches,
            replicas=window.replicas,
        )
        return None if found is None else tuple(found.tolist())  # the only wait for the device

    def remove(self) -> None:
        self._gradients.remove()


class Examples(Source):
    """The examples of every micro-batch, or the ghosts that are normalized together."""

    def __init__(self, micro_batch: int, *, ghosts: bool, max_examples: int | None) -> None:
        super().__init__(micro_batch)
        self._gradients, self._ghosts, self._max_examples = ExampleGradients(), ghosts, max_examples

    @property
    def small_batch(self) -> float:
        return self._gradients.small_batch

    @property
    def unmeasured(self) -> Mapping[str, str]:
        return self._gradients.unmeasured

    def check(self, model: nn.Module, *, compiled: bool = False) -> None:
        check_hearable(model, compiled=compiled)
        self._groups(model)

    def pause(self) -> None:
        self._gradients.remove()

    def listen(self, model: nn.Module, parameters: Sequence[Tensor], seed: int) -> None:
        self._gradients.listen(
            model,
            parameters,
            examples=self.micro_batch,
            groups=self._groups(model),
            max_examples=self._max_examples,
            seed=seed,
        )

    def _groups(self, model: nn.Module) -> list[slice] | None:
        layers = mixing_layers(model)
        groups = ghosts_of(layers, self.micro_batch) if self._ghosts else None
        if layers and groups is None:
            raise ValueError(
                f"{next(iter(layers))} normalizes over the batch, where a single example has no gradient: use "
                f"source='ghosts' with GhostBatchNorm, or source='accumulation' ({_ACCUMULATE})"
            )
        return groups

    def squares(self) -> tuple[Tensor, Tensor, int] | None:
        return self._gradients.squares()

    def remove(self) -> None:
        self._gradients.remove()


def ghosts_of(layers: Mapping[str, nn.Module], micro_batch: int) -> list[slice]:
    """Return which samples of a micro-batch form each ghost of all layers that normalize over the batch.

    Args:
        layers: By name, as :func:`~lightning_gap.regime.sample_noise.mixing_layers` finds them.
        micro_batch: Samples.

    Raises:
        ValueError: If there are none, one normalizes over the whole micro-batch or over replicas, or they differ.
    """
    if not layers:
        raise ValueError("no layer normalizes over ghosts: use source='examples', or put GhostBatchNorm in callbacks")
    found: dict[tuple[tuple[int, int, int], ...], str] = {}
    for name, layer in layers.items():
        ghosts_in = getattr(layer, "ghosts_in", None)
        if ghosts_in is None:
            raise ValueError(
                f"{name} ({type(layer).__name__}) normalizes over the whole micro-batch, which is one group then: put "
                f"GhostBatchNorm in callbacks, or {_ACCUMULATE}"
            )
        if getattr(layer, "process_group", None) is not None:
            raise ValueError(
                f"the ghosts of {name} span replicas: give each replica ghosts of its own, or source='replicas'"
            )
        found.setdefault(tuple(s.indices(micro_batch) for s in ghosts_in(micro_batch)), name)
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(list(found.values())[:2])} have different ghosts: give them one ghost_batch_size and "
            f"grouping, or {_ACCUMULATE}"
        )
    (ghosts,) = found
    return [slice(*each) for each in ghosts]


def source_of(
    source: NoiseSource,
    layers: Mapping[str, nn.Module],
    micro_batch: int,
    *,
    accumulated: int,
    replicas: int,
    max_examples: int | None = None,
    norm: NoiseNorm = "euclidean",
    optimizers: Sequence[Optimizer] = (),
) -> Source:
    """Return what a run listens to.

    Args:
        source: As asked for. ``"auto"``: micro-batches where an update has two; else examples, or ghosts where
            layers normalize over the batch.
        layers: Those that do.
        micro_batch: Samples.
        accumulated: Micro-batches of an update on each replica.
        replicas: That see different samples.
        max_examples: Of each micro-batch whose norms are taken.
        norm: In which gradients are measured; ``"auto"`` is that of the optimizers.
        optimizers: Of the run.

    Raises:
        ValueError: If the run has not what is asked for.
    """
    if norm == "auto" and common_norm(parameter_norms(optimizers, norm)) == "euclidean":
        norm = "euclidean"
    if source == "accumulation" and accumulated < 2:
        raise ValueError("source='accumulation' needs accumulate_grad_batches of 2 or more, with smaller batches")
    if source == "replicas" and replicas < 2:
        raise ValueError("source='replicas' needs several devices, and there is one: use source='examples'")
    if source in ("accumulation", "replicas") or (source == "auto" and accumulated * replicas > 1):
        return MicroBatches(micro_batch) if norm == "euclidean" else DualNorms(micro_batch, norm, optimizers)
    if norm != "euclidean":
        raise ValueError(
            f"norm={norm!r} needs the gradients of micro-batches themselves, and of single examples or ghosts only "
            f"Euclidean norms are found: {_ACCUMULATE}; or norm='euclidean'"
        )
    if source == "examples" or not (layers or source == "ghosts"):
        if micro_batch * accumulated * replicas < 2:
            raise ValueError("an update has one example, and there are no two batch sizes: use larger batches")
        return Examples(micro_batch, ghosts=False, max_examples=max_examples)
    if len(ghosts_of(layers, micro_batch)) * accumulated * replicas < 2:
        raise ValueError(
            f"an update is one ghost of {micro_batch} samples, so that there are no two batch sizes: use a smaller "
            f"ghost_batch_size, or {_ACCUMULATE}"
        )
    return Examples(micro_batch, ghosts=True, max_examples=max_examples)
