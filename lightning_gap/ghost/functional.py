"""Ghost batch normalization as a function: which samples share statistics, their normalization, the running averages.

Three parts, each of which can be replaced without the others: :func:`ghost_slices` decides the partition, two kernels
normalize over a partition (native batch-norm kernels, or a formula that ``torch.compile`` fuses), and
:func:`ghost_batch_norm` averages the statistics of all ghosts into the running ones.
"""

from itertools import pairwise
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Grouping", "RunningStats", "ghost_batch_norm", "ghost_slices"]

RunningStats = Literal["sequential", "per_step"]
Grouping = Literal["contiguous", "strided"]


def check_ghost_batch_size(ghost_batch_size: object) -> None:
    """Raise unless ``ghost_batch_size`` is a positive int.

    Args:
        ghost_batch_size: The value to judge.

    Raises:
        TypeError: If it is not an int (a bool is not one).
        ValueError: If it is below 1.
    """
    if isinstance(ghost_batch_size, bool) or not isinstance(ghost_batch_size, int):
        raise TypeError(
            f"ghost_batch_size must be an int, the number of samples that share statistics, got {ghost_batch_size!r}"
        )
    if ghost_batch_size < 1:
        raise ValueError(
            f"ghost_batch_size must be at least 1, got {ghost_batch_size}; the paper uses the small batch size, 128"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Args:
        name: The argument's name, for the message.
        value: The value to judge.
        choices: The allowed values.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_settings(ghost_batch_size: object, running_stats: object, grouping: object) -> None:
    """Raise unless the three arguments that describe ghost batches are usable.

    Args:
        ghost_batch_size: Samples that share statistics, an int of at least 1.
        running_stats: ``"sequential"`` or ``"per_step"``.
        grouping: ``"contiguous"`` or ``"strided"``.

    Raises:
        TypeError: If ``ghost_batch_size`` is not an int.
        ValueError: If a value is out of range.
    """
    check_ghost_batch_size(ghost_batch_size)
    check_choice("running_stats", running_stats, get_args(RunningStats))
    check_choice("grouping", grouping, get_args(Grouping))


def ghost_slices(
    batch_size: int, ghost_batch_size: int, *, grouping: Grouping = "contiguous", values_per_sample: int = 1
) -> list[slice]:
    r"""Return which samples of a batch form each ghost batch, in the order in which their statistics are averaged.

    A batch of :math:`n = F g + r` samples gives :math:`F` full ghosts of :math:`g` samples, whose statistics do not
    depend on what is left over, and one smaller last ghost of the :math:`r` samples that are. A last ghost of one
    value per channel has no variance and joins a full one. A batch of at most :math:`g` samples is one ghost: plain
    batch normalization.

    Args:
        batch_size: Samples in the batch, n.
        ghost_batch_size: Samples in a full ghost, g.
        grouping: ``"contiguous"``: ghost s has the samples sg .. sg+g-1, and a lone last sample joins the last ghost.
            ``"strided"``: the samples are dealt out in turn, ghost s has s, s+F, s+2F, ..., and a lone last sample is
            dealt to ghost 0.
        values_per_sample: Values that each sample has in one channel, H·W for images; only 1 leads to a merger.

    Returns:
        One slice of the batch dimension for each ghost; together they hold each sample once.

    Raises:
        TypeError: If ``ghost_batch_size`` is not an int.
        ValueError: If ``ghost_batch_size`` is below 1 or ``grouping`` unknown.

    Example:
        >>> ghost_slices(10, 4)
        [slice(0, 4, 1), slice(4, 8, 1), slice(8, 10, 1)]
        >>> ghost_slices(9, 4)  # a ninth sample alone has no variance
        [slice(0, 4, 1), slice(4, 9, 1)]
        >>> ghost_slices(9, 4, grouping="strided")
        [slice(0, 9, 2), slice(1, 8, 2)]
    """
    check_settings(ghost_batch_size, "sequential", grouping)
    full = batch_size // ghost_batch_size
    if full == 0 or batch_size == ghost_batch_size:
        return [slice(0, batch_size, 1)]
    whole = full * ghost_batch_size
    lone = (batch_size - whole) * values_per_sample == 1
    if grouping == "contiguous":
        bounds = [*range(0, whole + 1, ghost_batch_size)]
        if lone:
            bounds[-1] = batch_size
        elif whole < batch_size:
            bounds.append(batch_size)
        return [slice(start, stop, 1) for start, stop in pairwise(bounds)]
    slices = [slice(start, whole, full) for start in range(full)]
    if lone:
        slices[0] = slice(0, batch_size, full)
    elif whole < batch_size:
        slices.append(slice(whole, batch_size, 1))
    return slices


def ghost_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    ghost_batch_size: int,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    running_stats: RunningStats = "sequential",
    grouping: Grouping = "contiguous",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""Normalize each ghost batch of ``ghost_batch_size`` samples by its own mean and variance.

    For the samples :math:`X^s` of ghost s (see :func:`ghost_slices`), per channel,

    .. math:: \mu_s = \operatorname{mean}(X^s), \quad \sigma_s^2 = \operatorname{var}(X^s), \quad
        Y^s = \gamma\,\frac{X^s - \mu_s}{\sqrt{\sigma_s^2 + \varepsilon}} + \beta .

    Outputs, gradients and running statistics are those of feeding the ghosts through batch normalization one after
    another. With :math:`\eta` the momentum and G ghosts, the running statistics become

    .. math:: R \leftarrow (1-\eta)^G R + \sum_{i=0}^{G-1} \eta\,(1-\eta)^{G-1-i}\, S_i

    where :math:`S_i` is the mean, or the unbiased variance (Bessel's correction by the ghost's own count). This is the
    update that Algorithm 1 of the paper describes; as printed there its weights do not sum to one.

    In evaluation (``training=False``) it is plain batch normalization by the running statistics.

    Args:
        x: Input, (N, C) or (N, C, ...), of any floating dtype and memory format.
        running_mean: (C,), updated in place; None for no running statistics.
        running_var: (C,), updated in place; None together with ``running_mean``.
        weight: Scale γ, (C,), or None for 1.
        bias: Shift β, (C,), or None for 0.
        ghost_batch_size: Samples that share statistics.
        training: Whether to normalize by the ghosts' statistics and to update the running ones.
        momentum: η in [0, 1], or None for the cumulative average.
        eps: ε > 0, added to the variance.
        running_stats: ``"sequential"``: each ghost is one update, as above. ``"per_step"``: the batch is one update,
            with :math:`\eta' = 1-(1-\eta)^{1/G}` for η: the old statistics keep the weight 1-η, as with plain batch
            normalization, where the sequential update keeps only :math:`(1-\eta)^G`.
        grouping: Which samples form a ghost, ``"contiguous"`` (the paper's) or ``"strided"``.
        num_batches_tracked: Scalar count of the updates so far, increased in place: by G if sequential, by 1 if per
            step. Needed by ``momentum=None``.

    Returns:
        The normalized tensor, of the shape and dtype of ``x``.

    Raises:
        TypeError: If ``ghost_batch_size`` is not an int.
        ValueError: If an argument is out of range, or if each ghost would have one value per channel.

    References:
        Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in large batch
        training of neural networks", 2017, Algorithm 1.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
        >>> ghost_batch_norm(x, None, None, ghost_batch_size=2).flatten().round().tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """
    check_settings(ghost_batch_size, running_stats, grouping)
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C) or (N, C, ...), got shape {tuple(x.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be tensors or both be None")
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum=None averages over all updates so far: pass their count as num_batches_tracked")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], or be None for the cumulative average, got {momentum!r}")
    if not eps > 0:
        raise ValueError(f"eps must be positive in training, got {eps!r}")

    parts = _Partition.of(x, ghost_batch_size, grouping)
    if parts.ghosts == 1 or x.numel() == 0:
        return _one_ghost(x, running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked)
    if ghost_batch_size == parts.values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel in each ghost batch when training, got input size "
            f"{tuple(x.shape)} and ghost_batch_size=1: raise ghost_batch_size"
        )
    native = x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    y, mean, var = (_normalize_by_kernels if native else _normalize_by_formula)(x, weight, bias, eps, parts)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(parts.ghosts if running_stats == "sequential" else 1)
    if running_mean is not None and running_var is not None:
        weights, decay = _average_weights(parts.ghosts, momentum, running_stats, num_batches_tracked, mean)
        for running, stat in ((running_mean, mean), (running_var, var)):
            running.copy_(running.to(stat.dtype) * decay + (weights[:, None] * stat).sum(0))
    return y


class _Partition(NamedTuple):
    """How a batch falls into ghosts, as numbers that may be symbolic under ``torch.compile``."""

    batch: int
    ghost_size: int
    full: int  # full ghosts
    rest: int  # samples that fill none
    values: int  # values per sample and channel
    grouping: Grouping

    @classmethod
    def of(cls, x: Tensor, ghost_batch_size: int, grouping: Grouping) -> "_Partition":
        n = x.shape[0]
        full, rest = n // ghost_batch_size, n % ghost_batch_size  # divmod is not for symbolic sizes
        return cls(n, ghost_batch_size, full, rest, prod(x.shape[2:]), grouping)

    @property
    def lone(self) -> bool:
        """Whether the rest is one value per channel, which joins a full ghost."""
        return self.full > 0 and self.rest * self.values == 1

    @property
    def ghosts(self) -> int:
        return self.full + int(self.rest > 0 and not self.lone)

    @property
    def whole(self) -> int:
        return self.full * self.ghost_size


def _one_ghost(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """Normalize as ``torch.nn.BatchNorm`` does, bit for bit."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
    return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)


def _average_weights(
    ghosts: int, momentum: float | None, running_stats: RunningStats, updates: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | float]:
    """Return the weight of each ghost's statistics in the running ones, and the weight of the old running ones."""
    if momentum is None:
        assert updates is not None  # checked with the arguments
        new = ghosts if running_stats == "sequential" else 1
        total = updates.to(like.dtype)  # the new updates are counted already; no synchronization with the host
        return (new / (ghosts * total)).expand(ghosts), 1 - new / total
    keep = 1 - momentum if running_stats == "sequential" else (1 - momentum) ** (1 / ghosts)
    age = torch.arange(ghosts - 1, -1, -1, device=like.device, dtype=like.dtype)
    return (1 - keep) * keep**age, keep**ghosts


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


# --- Kernels: eager CPU and CUDA ---------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Ghosts that one kernel call normalizes: ``width`` of them, laid side by side along the channels."""

    samples: slice
    width: int

    def of(self, t: Tensor) -> Tensor:
        part = t[self.samples]
        if self.width == 1:
            return part
        return part.reshape(part.shape[0] // self.width, self.width * part.shape[1], *part.shape[2:])

    def repeat(self, t: Tensor | None) -> Tensor | None:
        return t if t is None or self.width == 1 else t.repeat(self.width)


def _groups(x: Tensor, parts: _Partition) -> list[_Group]:
    if parts.grouping == "strided" and x.is_contiguous() and not parts.lone:
        # Sample k·F + s is row k, channels s·C .. s·C + C-1 of a view: all full ghosts in one kernel call.
        rest = [_Group(slice(parts.whole, parts.batch, 1), 1)] if parts.rest else []
        return [_Group(slice(0, parts.whole, 1), parts.full), *rest]
    slices = ghost_slices(parts.batch, parts.ghost_size, grouping=parts.grouping, values_per_sample=parts.values)
    return [_Group(samples, 1) for samples in slices]


def _is_dense(t: Tensor) -> bool:
    """Whether the kernels take their fast path, and can write in place; others get a dense copy for speed."""
    return (
        t.is_contiguous()
        or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
        or (t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d))
    )


class _NativeGhostNorm(torch.autograd.Function):
    """Native batch-norm kernels, group by group, into one output; differentiable twice."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: list[_Group]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        ghosts = sum(group.width for group in groups)
        # Zeros, not scratch: the kernels blend them in with weight 0, and 0 · NaN is NaN.
        shape, dtype = (ghosts, x.shape[1]), _statistics_dtype(x)
        mean, var, invstd, spare = (x.new_zeros(shape, dtype=dtype) for _ in range(4))
        first = 0
        for group in groups:
            rows = slice(first, first + group.width)
            first += group.width
            part, out = group.of(x), group.of(y)
            # With momentum 1 the kernel's running statistics are the ghost's own mean and unbiased variance.
            arguments = (
                group.repeat(weight), group.repeat(bias), spare[rows].view(-1), var[rows].view(-1), True, 1.0, eps
            )  # fmt: skip
            saved = mean[rows].view(-1), invstd[rows].view(-1)
            if _is_dense(part) and _is_dense(out):
                torch.ops.aten.native_batch_norm.out(
                    part, *arguments, out=out, save_mean=saved[0], save_invstd=saved[1]
                )
            else:
                results = torch.ops.aten.native_batch_norm(part.clone(), *arguments)
                for target, result in zip((out, *saved), results, strict=True):
                    target.copy_(result)
        return y, mean, var, invstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps, ctx.groups = inputs
        _, mean, var, invstd = output
        ctx.mark_non_differentiable(mean, var, invstd)
        ctx.save_for_backward(x, weight, mean, invstd)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x) if mask[0] else None
        sums: list[list[Tensor]] = [[], []]
        first = 0
        for group in ctx.groups:
            rows = slice(first, first + group.width)
            first += group.width
            part, grad_part = group.of(x), group.of(grad_y)
            # The kernel's own derivative counts what flows through the saved statistics: a second backward is right.
            gradients = torch.ops.aten.native_batch_norm_backward(
                grad_part if _is_dense(grad_part) else grad_part.clone(),
                part if _is_dense(part) else part.clone(),
                group.repeat(weight), None, None, mean[rows].view(-1), invstd[rows].view(-1), True, ctx.eps, mask,
            )  # fmt: skip
            if grad_x is not None:
                group.of(grad_x).copy_(gradients[0])
            for parts, wanted, gradient in zip(sums, mask[1:], gradients[1:], strict=True):
                if wanted:
                    parts.append(gradient.view(group.width, -1))
        grad_weight, grad_bias = (torch.cat(parts).sum(0) if parts else None for parts in sums)
        return grad_x, grad_weight, grad_bias, None, None


def _normalize_by_kernels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, parts: _Partition
) -> tuple[Tensor, Tensor, Tensor]:
    # float32 scale and shift beside a half-precision input make the kernels keep their statistics in float32
    weight, bias = (t if t is None or t.dtype == x.dtype == _statistics_dtype(x) else t.float() for t in (weight, bias))
    groups = _groups(x, parts)
    y, mean, var, _ = _NativeGhostNorm.apply(x, weight, bias, eps, groups)  # type: ignore[no-untyped-call]
    return y, mean, var


# --- Formula: torch.compile, torch.export, other devices ---------------------------------------------------------


def _normalize_by_formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, parts: _Partition
) -> tuple[Tensor, Tensor, Tensor]:
    order = None
    if parts.grouping == "strided":
        sample = torch.arange(parts.batch, device=x.device)
        ghost = sample % parts.full
        if not parts.lone:
            ghost = torch.where(sample < parts.whole, ghost, parts.full)
        order = ghost.argsort(stable=True)
        x = x.index_select(0, order)
    results = [_normalize_run(x[start:stop], count, weight, bias, eps) for start, stop, count in _runs(parts)]
    y, mean, var = (torch.cat(column) for column in zip(*results, strict=True))
    if order is not None:
        y = y.index_select(0, order.argsort())
    return y, mean.detach(), var.detach()


def _runs(parts: _Partition) -> list[tuple[int, int, int]]:
    """Return start, stop and count of the runs of equal ghosts, once the samples lie in the order of their ghosts."""
    n, whole = parts.batch, parts.whole
    if not parts.lone:
        runs = [(0, whole, parts.full), (whole, n, 1)]
    elif parts.grouping == "contiguous":
        runs = [(0, whole - parts.ghost_size, parts.full - 1), (whole - parts.ghost_size, n, 1)]
    else:
        runs = [(0, parts.ghost_size + 1, 1), (parts.ghost_size + 1, n, parts.full - 1)]
    return [run for run in runs if run[0] < run[1]]


def _normalize_run(
    x: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    ghosts = x.unflatten(0, (count, x.shape[0] // count)).to(_statistics_dtype(x))
    over = [1, *range(3, ghosts.dim())]
    var, mean = torch.var_mean(ghosts, over, correction=0, keepdim=True)
    y = (ghosts - mean) * torch.rsqrt(var + eps)
    per_channel = (-1, *(1,) * (x.dim() - 2))
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    values = ghosts.shape[1] * prod(x.shape[2:])
    unbiased = var * (values / (values - 1))
    return y.flatten(0, 1).to(x.dtype), mean.reshape(count, -1), unbiased.reshape(count, -1)
