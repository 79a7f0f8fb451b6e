"""Noise and norms of gradients in dual norms, from the micro-batches of an update."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.ranks.group import mean_over_ranks
from lightning_gap.regime.dual_norms import DualNorm, gram_of, matrix_of, noise_and_norm
from lightning_gap.regime.noise_sources.contributions import wide
from lightning_gap.regime.noise_sources.optimizer_norms import MeasuredParameter, NoiseNorm, parameter_norms

__all__ = ["DualNormGradients"]


class DualNormGradients:
    r"""Hears the gradient of each backward pass while gradients are accumulated, for the noise scale in dual norms.

    Kept are the sums of squares of the micro-batches' gradients, one buffer of a parameter's size, or of the Gram
    matrices :math:`g g^T` of the smaller side. Gradients and graphs are left as they are, bit for bit. For loops of
    your own; :class:`~lightning_gap.GradientNoiseScale` of another ``norm`` than the Euclidean one uses it too.

    References:
        Naganuma et al. 2026, "Adaptive batch sizes using non-Euclidean gradient noise scales for stochastic sign and
        spectral descent" (arXiv:2602.03001).

    Example:
        >>> from lightning_gap.regime import DualNoiseScaleEstimate
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> gradients, estimate = DualNormGradients(), DualNoiseScaleEstimate(decay=0.95, norm="l1")
        >>> for update in range(20):
        ...     optimizer.zero_grad()
        ...     gradients.listen([optimizer], "l1")
        ...     for _ in range(4):  # micro-batches of 8 samples
        ...         x = torch.randn(8, 4)
        ...         loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
        ...         (loss / 4).backward()
        ...     estimate.update(*gradients.moments(micro_batch_size=8))
        ...     optimizer.step()
        >>> estimate.measurements, estimate.critical_batch_size > 0
        (20, True)
        >>> gradients.remove()
    """

    def __init__(self) -> None:
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._measured: dict[Tensor, MeasuredParameter] = {}  # of the present update
        self._sums: dict[Tensor, Tensor] = {}
        self._passes: dict[Tensor, int] = {}
        self._listening = False

    def listen(self, optimizers: Iterable[Optimizer], norm: NoiseNorm = "auto") -> None:
        """Start to hear the gradients of one update, which must be zero or None now.

        Args:
            optimizers: All that make the update.
            norm: ``"l1"`` or ``"nuclear"`` of all parameters, or ``"auto"``, of each parameter that of its optimizer,
                weighted by the learning rate.

        Raises:
            ValueError: If an optimizer's norm is not known or Euclidean, or a lazy module's parameters have no shape.
        """
        check_choice("norm", norm, ("auto", "l1", "nuclear"))
        measured = parameter_norms(optimizers, norm)
        if any(each.norm == "euclidean" for each in measured):
            raise ValueError("norm='auto' is the Euclidean norm here: use MicroBatchGradients, or name a norm")
        if any(is_lazy(each.parameter) for each in measured):
            raise ValueError("a lazy module's parameters have no shape before its first batch: run one forward before")
        self._measured = {each.parameter: each for each in measured}
        self._sums, self._passes, self._listening = {}, {}, True
        for parameter in self._measured:
            if parameter not in self._hooks:
                # A leaf's hook sees the gradient of one backward pass, on one replica.
                self._hooks[parameter] = parameter.register_hook(partial(self._hear, parameter))

    def _hear(self, parameter: Tensor, gradient: Tensor) -> None:
        if not self._listening or parameter not in self._measured:
            return
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            values, old = _real(gradient.detach()), self._sums.get(parameter)
            if self._measured[parameter].norm == "nuclear":
                gram = gram_of(values)
                new = gram if old is None else old.add_(gram)
            else:
                new = values.square() if old is None else old.addcmul_(values, values)
            self._sums[parameter] = new
        self._passes[parameter] = self._passes.get(parameter, 0) + 1

    def pause(self) -> None:
        """Forget the update that is heard."""
        self._sums, self._passes, self._listening = {}, {}, False

    def norms(
        self,
        micro_batch_size: float,
        *,
        factor: float | Tensor,
        mean_factor: float,
        micro_batches: int,
        replicas: int = 1,
    ) -> Tensor | None:
        """Stop to hear, and return N, the mean gradient's norm and that of noise alone, (3,); None if nothing was.

        Args:
            micro_batch_size: Samples of each micro-batch.
            factor: What makes a micro-batch's own mean gradient of one that came out of the backward pass.
            mean_factor: What makes the mean gradient of what is in ``.grad`` now.
            micro_batches: On each replica.
            replicas: Processes whose gradients have been averaged in ``.grad``. Collective.
        """
        sums, heard = self._sums, bool(self._passes)
        self.pause()
        if not heard:
            return None
        weights = [each.weight for each in self._measured.values()]
        largest = max(weights) or 1.0
        found = []
        with torch.no_grad(), torch.autocast(next(iter(sums)).device.type, enabled=False):
            for each, weight in zip(self._measured.values(), weights, strict=True):
                # Every rank takes every parameter, also those that its own micro-batches did not reach.
                if each.parameter.grad is None:
                    continue
                mean = _real(each.parameter.grad)
                mean = mean if mean_factor == 1 else mean * mean_factor
                second = sums.pop(each.parameter, None)
                if second is None:
                    side = matrix_of(mean)
                    second = torch.zeros_like(mean) if each.norm == "l1" else side.new_zeros(len(side), len(side))
                if replicas > 1:
                    second = mean_over_ranks(second)
                parts = micro_batches * replicas
                second.mul_(factor**2 / micro_batches)  # nobody else's
                norm: DualNorm = "nuclear" if each.norm == "nuclear" else "l1"
                numbers = noise_and_norm(norm, second, mean, small_batch=micro_batch_size, parts=parts)
                found.append(numbers * (weight / largest if max(weights) else 1.0))
        return torch.stack([each.to(found[0]) for each in found]).sum(0) if found else None

    def moments(
        self, micro_batch_size: int, *, loss_factor: float | None = None, replicas: int = 1
    ) -> tuple[float, float, float]:
        r"""Return N, the norm of the mean gradient, and that of noise alone, for :class:`DualNoiseScaleEstimate`.

        Args:
            micro_batch_size: Samples of each micro-batch.
            loss_factor: What the mean loss of each micro-batch was multiplied by before its backward pass, a
                gradient scaler's factor included, if gradients are not unscaled yet; 1 / micro-batches by default.
            replicas: Processes whose gradients have been averaged in ``.grad``, as by DDP. Collective.

        Raises:
            ValueError: If an argument is out of its range, or the update had one micro-batch in all, or none.
        """
        check_integer("micro_batch_size", micro_batch_size)
        check_integer("replicas", replicas)
        passes = max(self._passes.values(), default=0)
        if passes * replicas < 2:
            raise ValueError(
                f"an update of {passes} micro-batches on replicas={replicas} shows no noise: call listen(optimizers) "
                "before the first of two or more backward passes."
            )
        loss_factor = 1 / passes if loss_factor is None else loss_factor
        found = self.norms(
            micro_batch_size,
            factor=1 / loss_factor,
            mean_factor=1 / (passes * loss_factor),
            micro_batches=passes,
            replicas=replicas,
        )
        noise, gradient, floor = (math.nan,) * 3 if found is None else found.tolist()  # the only wait for the device
        return noise, gradient, floor

    def remove(self) -> None:
        """Stop for good: take the hooks off the parameters."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._measured = {}, {}
        self.pause()


def _real(gradient: Tensor) -> Tensor:
    """Return a gradient densely, in single precision or more, real and imaginary parts as coordinates of their own."""
    dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return wide(torch.view_as_real(dense) if dense.is_complex() else dense)
