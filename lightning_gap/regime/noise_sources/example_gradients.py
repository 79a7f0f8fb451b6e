"""Squared norms of single examples' gradients, found while the ordinary backward pass runs."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_gap.checks import check_integer
from lightning_gap.ranks.gradients import gradient_values
from lightning_gap.ranks.group import mean_over_ranks
from lightning_gap.regime.noise_scale import gradient_moments
from lightning_gap.regime.noise_sources.calls import Call, CannotMeasureError
from lightning_gap.regime.noise_sources.contributions import Contribution, group_squares, wide
from lightning_gap.regime.noise_sources.groups import Groups
from lightning_gap.regime.noise_sources.layers import rule_of
from lightning_gap.trainer.internals.of_torch import is_compiled

__all__ = ["ExampleGradients"]


class ExampleGradients:
    r"""Hears the gradient of each example of a batch, as far as its norm, in the one backward pass of the batch.

    With a loss that is the mean over B examples, an example's gradient is B times what it adds to the batch's. A linear
    layer's is :math:`\sum_t \delta_t x_t^T` of its inputs and the gradients of its outputs, and

    .. math:: \Big\|\sum_t \delta_t x_t^T\Big\|^2 = \langle X X^T, \Delta \Delta^T \rangle;

    for other layers see the modules beside this one. Linear layers, convolutions and transposed ones, embeddings,
    attention (``nn.MultiheadAttention``), layer, RMS, group and instance normalization, and frozen BatchNorm are
    taken; a layer that runs several times counts once, with all its calls. When a parameter is first heard, what was
    found for its examples is compared with its gradient; a parameter whose gradient has another source (a penalty on
    the weights, a call past its layer) is not measured, and is named in :attr:`unmeasured`.

    An example's rows must follow each other in the first dimension of what layers are given. Where a loss is a mean
    over tokens, an example of more tokens weighs more. A sum over examples gives both moments times B², and the
    same ratio.

    Gradients and graphs are left as they are, bit for bit.

    Attributes:
        unmeasured: The parameters that are heard and cannot be measured, by name, each with the reason.

    References:
        Gray, Tiwari, Bergsma, Hestness 2024, "Normalization layer per-example gradients are sufficient to predict
        gradient noise scale in transformers", section 3. Goodfellow 2015, "Efficient per-example gradient
        computations".

    Example:
        >>> from lightning_gap.regime import NoiseScaleEstimate
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> gradients, estimate = ExampleGradients(), NoiseScaleEstimate(decay=0.95)
        >>> for update in range(20):
        ...     optimizer.zero_grad()
        ...     gradients.listen(model, examples=32)
        ...     x = torch.randn(32, 4)
        ...     (model(x).squeeze(1) - x.sum(1)).square().mean().backward()
        ...     estimate.update(*gradients.moments())
        ...     optimizer.step()
        >>> estimate.measurements, gradients.unmeasured
        (20, {})
    """

    def __init__(self) -> None:
        self.unmeasured: dict[str, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._names: dict[Tensor, str] = {}
        self._pending: dict[Tensor, list[Contribution]] = {}
        self._squares: dict[Tensor, list[Tensor]] = {}
        self._reasons: dict[Tensor, str] = {}
        self._found: dict[Tensor, str] = {}  # reasons of this update, which may come to nothing
        self._rough: set[Tensor] = set()  # parameters whose gradients are sums in half precision
        self._seen: set[Tensor] = set()  # parameters whose sums have been compared with their gradients
        self._differences: dict[Tensor, Tensor] = {}
        self._measurable = False  # whether an update was
        self._groups = Groups.of(1)

    def listen(
        self,
        model: nn.Module,
        parameters: Iterable[Tensor] | None = None,
        *,
        examples: int,
        groups: Sequence[slice] | None = None,
        max_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Start to hear the gradients of one update, which must be zero or None now.

        Args:
            model: The module that makes the loss, or holds what does.
            parameters: Those that the optimizer updates; by default all that the model trains.
            examples: In each micro-batch.
            groups: Examples whose gradients are taken together, by their places, a slice for each group; by default
                each example by itself. Of layers that normalize over ghosts those of a ghost,
                see :func:`~lightning_gap.ghost.ghost_slices`.
            max_examples: Take the norms of groups of about so many examples of each micro-batch, drawn at random: the
                mean over them is that over all on average, and costs less. By default all.
            seed: Names the draw; another for each update. No generator of torch's is touched.

        Raises:
            TypeError: If ``examples`` or ``max_examples`` is not an int.
            ValueError: If it is below 1, ``groups`` is no partition, the model has layers with ``batch_first=False``,
                modules compiled by torch, or lazy parameters, or groups that are single samples beside layers that
                normalize over several.
        """
        check_integer("examples", examples, what="the samples of a micro-batch")
        self.remove()
        self._groups = Groups.of(examples, groups)
        if max_examples is not None:
            check_integer("max_examples", max_examples, what="the examples of a micro-batch that are measured, or None")
            self._groups = self._groups.drawn(max_examples, seed)
        check_hearable(model)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        chosen = [p for p in (self._names if parameters is None else parameters) if p.requires_grad]
        if any(is_lazy(parameter) for parameter in chosen):
            raise ValueError("a lazy module's parameters have no shape before its first batch: run one forward before")
        self._hooks = [parameter.register_hook(partial(self._hear, parameter)) for parameter in chosen]
        listened = set(chosen)
        for layer in model.modules():
            if (rule := rule_of(layer)) is not None and any(p in listened for p in layer.parameters()):
                hook = partial(self._called, rule, listened)
                self._hooks.append(layer.register_forward_hook(hook, with_kwargs=True))

    def _called(self, rule: Any, listened: set[Tensor], layer: Any, inputs: Any, named: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not (isinstance(first, Tensor) and first.requires_grad and torch.is_grad_enabled()):
            return
        known: dict[int, Tensor] = {}  # what is given twice stays one tensor
        given = tuple(_detached(value, known) for value in inputs)
        named = {name: _detached(value, known) for name, value in named.items()}
        if not given and "input" in named:
            given = (named.pop("input"),)
        call = Call(given, self._groups.examples, named)

        def hear(delta: Tensor) -> None:
            try:
                with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
                    for parameter, contribution in rule(layer, call, delta.detach()):
                        if parameter in listened:
                            if delta.dtype in (torch.float16, torch.bfloat16):
                                self._rough.add(parameter)
                            self._pending.setdefault(parameter, []).append(contribution)
            except CannotMeasureError as error:
                for parameter in layer.parameters():
                    self._found[parameter] = str(error)

        first.register_hook(hear)

    def _hear(self, parameter: Tensor, gradient: Tensor) -> None:
        """Square what a backward pass has brought for a parameter, whose gradient is whole now."""
        contributions = self._pending.pop(parameter, [])
        if parameter in self._reasons or parameter in self._found:
            return
        if not contributions or parameter.is_complex():
            reason = "no layer that is known has made it by its own call" if not contributions else "it is complex"
            self._found[parameter] = reason
            return
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            try:
                squares = group_squares(contributions, self._groups)
            except NotImplementedError as error:
                self._found[parameter] = str(error)
                return
            self._squares.setdefault(parameter, []).append(squares)
            if parameter not in self._seen:
                self._seen.add(parameter)
                self._differences[parameter] = _difference(gradient.detach(), contributions, squares)

    def squares(self) -> tuple[Tensor, Tensor, int] | None:
        """Stop to hear, and return what was heard; None if nothing was that can be measured.

        Returns:
            The sum over groups and micro-batches of the squared norms of their gradients, each times (B / size)² for
            the loss that is the group's own mean; the squared norm of what is in ``.grad`` now of the parameters that
            are measured; and the number of groups that were taken.
        """
        heard = self._measured()
        if not heard:
            return None
        total = torch.stack([vector for vectors in heard.values() for vector in vectors]).sum(0)
        small = torch.stack([part.sum() * weight for part, weight in self._weighed(total)]).sum()
        now = [_norm(parameter.grad) for parameter in heard if parameter.grad is not None]
        if not now:
            return None
        passes = max(map(len, heard.values()))
        return small, torch.stack(now).square().sum(), passes * self._groups.count

    def norms(self) -> Tensor:
        """Stop to hear, and return the squared norm of every group's gradient, (micro-batches · groups,).

        Each is of the group's own mean loss, times what the micro-batch's was multiplied by. Groups are in the order
        in which ``groups`` named them, larger and smaller ones apart.
        """
        heard = self._measured()
        passes = [torch.stack(vectors).sum(0) for vectors in zip(*heard.values(), strict=True)]
        return torch.cat([part * weight for vector in passes for part, weight in self._weighed(vector)])

    def moments(self, *, loss_factor: float | None = None, replicas: int = 1) -> tuple[float, float]:
        r"""Return estimates of :math:`\operatorname{tr} \Sigma` and :math:`|G|^2` from the gradients of an update.

        Args:
            loss_factor: What the mean loss of each micro-batch was multiplied by before its backward pass, a
                gradient scaler's factor included, if gradients are not unscaled yet; 1 / micro-batches by default.
            replicas: Processes whose gradients have been averaged in ``.grad``, as by DDP. Collective.

        Raises:
            ValueError: If ``replicas`` is below 1, or nothing was heard that can be measured, or one group alone.
        """
        check_integer("replicas", replicas)
        found = self.squares()
        whole = 0 if found is None else self._groups.examples * (found[2] // self._groups.count) * replicas
        if found is None or whole <= self.small_batch:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.unmeasured.items())[:3])
            raise ValueError(
                "there are no gradients of examples: call listen(model, examples=...) before the forward pass of an "
                f"update of two examples or more{reasons and f' ({reasons})'}"
            )
        small, big, groups = found
        micro_batches = groups // self._groups.count
        factor = 1 / micro_batches if loss_factor is None else loss_factor
        if replicas > 1:
            small = mean_over_ranks(small)
        small_square, big_square = torch.stack((small, big.to(small))).tolist()  # the only wait for the device
        return gradient_moments(
            small_square / groups / factor**2,
            big_square / (micro_batches * factor) ** 2,
            self.small_batch,
            whole,
        )

    @property
    def small_batch(self) -> float:
        """The batch size of the groups: 1, or the samples that are normalized together."""
        return self._groups.small_batch

    def remove(self) -> None:
        """Stop for good: take the hooks off, and forget what was heard."""
        self._stop()
        self._pending, self._squares, self._found = {}, {}, {}
        self._seen -= self._differences.keys()
        self._differences = {}

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _measured(self) -> dict[Tensor, list[Tensor]]:
        """Stop to hear, and return the squares of the groups, of each parameter that is measured."""
        self._stop()
        heard, self._squares, self._pending = self._squares, {}, {}
        if compared := list(self._differences):
            numbers = torch.stack([self._differences[parameter].double() for parameter in compared]).tolist()
            total = math.hypot(*(size for _, size in numbers))
            for parameter, (much, size) in zip(compared, numbers, strict=True):
                # Where a gradient is zero but for rounding, as of a bias that is normalized away, only the whole tells.
                allowed = 0.1 if parameter in self._rough else 1e-6 if parameter.dtype == torch.float64 else 1e-2
                if not math.isfinite(much):
                    self._seen.discard(parameter)  # an overflow in half precision: compare the next one
                elif much > allowed * size + 1e-6 * total:
                    self._found[parameter] = "its gradient is not the sum of what its layer's calls add"
            self._differences = {}
        if self._measurable and not heard.keys() - self._found.keys():
            self._found = {}  # a batch of another size, which says nothing of the others
            return {}
        passes = max(map(len, heard.values()), default=0)
        for parameter, vectors in heard.items():
            if len(vectors) != passes:
                self._found.setdefault(parameter, "not every backward pass reaches it once")
        self._reasons, self._found = {**self._found, **self._reasons}, {}
        self.unmeasured |= {self._names.get(p, "?"): reason for p, reason in self._reasons.items()}
        measured = {parameter: vectors for parameter, vectors in heard.items() if parameter not in self._reasons}
        self._measurable |= bool(measured)
        return measured

    def _weighed(self, squares: Tensor) -> list[tuple[Tensor, float]]:
        """Return the squares of groups of one size, and what makes them those of the group's own mean loss."""
        blocks = self._groups.blocks
        parts = squares.split([block.count for block in blocks])
        return [(part, (self._groups.examples / block.size) ** 2) for part, block in zip(parts, blocks, strict=True)]


def check_hearable(model: nn.Module, *, compiled: bool = False) -> None:
    """Refuse a model whose layers' calls cannot be heard, or do not have the examples in the first dimension."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if getattr(module, "batch_first", True) is False:
            raise ValueError(f"{where} takes the examples in its second dimension: make it batch-first")
        if compiled or is_compiled(module):
            raise ValueError(
                f"{where} is compiled by torch, and its layers are not heard: measure without torch.compile, or "
                "between micro-batches (MicroBatchGradients; GradientNoiseScale(source='accumulation'))"
            )


def _detached(value: Any, known: dict[int, Tensor]) -> Any:
    return known.setdefault(id(value), value.detach()) if isinstance(value, Tensor) else value


def _difference(gradient: Tensor, contributions: Sequence[Contribution], squares: Tensor) -> Tensor:
    """Return how far the sum over examples is from the gradient, against a random sign matrix, and the size of both."""
    dense = wide(gradient.to_dense() if gradient.is_sparse else gradient)
    matrix = dense.reshape(len(dense) if dense.dim() else 1, -1)
    generator = torch.Generator().manual_seed(0)  # no one else's
    rows, columns = ((torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(matrix) for size in matrix.shape)
    expected = rows @ matrix @ columns
    found = torch.stack([each.against(rows, columns) for each in contributions]).sum()
    return torch.stack(((found - expected).abs(), (matrix.square().sum() + squares.sum()).sqrt()))


def _norm(gradient: Tensor) -> Tensor:
    values = gradient_values(gradient)
    half = values.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if half else None)
    return norm
