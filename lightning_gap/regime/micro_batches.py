"""The gradients of micro-batches, heard while they are accumulated."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_gap.ranks.gradients import gradient_values
from lightning_gap.ranks.group import mean_over_ranks
from lightning_gap.regime.noise_scale import gradient_moments

__all__ = ["MicroBatchGradients"]


class MicroBatchGradients:
    r"""Hears the gradient of each backward pass while gradients are accumulated, and compares them with their mean.

    For loops of your own, in plain torch or Fabric, where :class:`~lightning_gap.GradientNoiseScale` cannot be: call
    :meth:`listen` before the first backward pass of an update, and :meth:`moments` after the last, before gradients are
    clipped or the optimizer steps. Gradients and graphs are left as they are.

    Example:
        >>> from lightning_gap.regime import NoiseScaleEstimate
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> gradients, estimate = MicroBatchGradients(), NoiseScaleEstimate(decay=0.95)
        >>> for update in range(20):
        ...     optimizer.zero_grad()
        ...     gradients.listen(model.parameters())
        ...     for _ in range(4):  # micro-batches of 8 samples
        ...         x = torch.randn(8, 4)
        ...         loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
        ...         (loss / 4).backward()
        ...     estimate.update(*gradients.moments(micro_batch_size=8))
        ...     optimizer.step()
        >>> estimate.measurements
        20
        >>> estimate.critical_batch_size > 0
        True
        >>> gradients.remove()
    """

    def __init__(self) -> None:
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._parameters: list[Tensor] = []  # of the present update
        self._norms: dict[Tensor, list[Tensor]] = {}
        self._listening = False

    def listen(self, parameters: Iterable[Tensor]) -> None:
        """Start to hear the gradients of one update, which must be zero or None now.

        Args:
            parameters: Those that the optimizer updates.

        Raises:
            ValueError: If a lazy module's parameters have no shape yet.
        """
        self._norms, self._listening = {}, True
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if any(is_lazy(parameter) for parameter in self._parameters):
            raise ValueError("a lazy module's parameters have no shape before its first batch: run one forward before")
        for parameter in self._parameters:
            if parameter not in self._hooks:
                # A leaf's hook sees the gradient of one backward pass, on one replica.
                self._hooks[parameter] = parameter.register_hook(partial(self._hear, parameter))

    def _hear(self, parameter: Tensor, gradient: Tensor) -> None:
        if self._listening:
            self._norms.setdefault(parameter, []).append(_norm(gradient.detach()))

    def squares(self) -> tuple[Tensor, Tensor, int] | None:
        """Stop to hear, and return what was heard; None if nothing was.

        Returns:
            The sum over micro-batches of the squared norms of their gradients, as they came out of the backward pass,
            the squared norm of what is in ``.grad`` now, and the number of micro-batches.
        """
        norms, self._norms, self._listening = self._norms, {}, False
        every = [norm for heard in norms.values() for norm in heard]
        now = [_norm(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        if not (every and now):
            return None
        small, big = (torch.stack(several).square().sum() for several in (every, now))
        return small, big, max(map(len, norms.values()))

    def moments(
        self, micro_batch_size: int, *, loss_factor: float | None = None, replicas: int = 1
    ) -> tuple[float, float]:
        r"""Return estimates of :math:`\operatorname{tr} \Sigma` and :math:`|G|^2` from the gradients of an update.

        Args:
            micro_batch_size: Samples of each micro-batch.
            loss_factor: What the mean loss of each micro-batch was multiplied by before its backward pass, a
                gradient scaler's factor included, if gradients are not unscaled yet; 1 / micro-batches by default.
            replicas: Processes whose gradients have been averaged in ``.grad``, as by DDP. Collective.

        Raises:
            ValueError: If an argument is out of its range, or the update had one micro-batch in all, or none.
        """
        if micro_batch_size < 1 or replicas < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} and replicas={replicas} must be 1 or more")
        found = self.squares()
        if found is None or found[2] * replicas < 2:
            heard = 0 if found is None else found[2]
            raise ValueError(
                f"an update of {heard} micro-batches on replicas={replicas} has no two batch sizes to compare: call "
                "listen(model.parameters()) before the first of two or more backward passes."
            )
        small, big, micro_batches = found
        factor = 1 / micro_batches if loss_factor is None else loss_factor
        if replicas > 1:
            small = mean_over_ranks(small)
        small_square, big_square = torch.stack((small, big)).tolist()  # the only wait for the device
        return gradient_moments(
            small_square / micro_batches / factor**2,
            big_square / (micro_batches * factor) ** 2,
            micro_batch_size,
            micro_batch_size * micro_batches * replicas,
        )

    def remove(self) -> None:
        """Stop for good: take the hooks off the parameters."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._parameters, self._norms, self._listening = {}, [], {}, False


def _norm(gradient: Tensor) -> Tensor:
    values = gradient_values(gradient)
    half = values.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if half else None)
    return norm
