"""Ghost batch normalization as a function: which samples share statistics, their normalization, the running averages.

:func:`ghost_slices` says which samples form a ghost; :func:`ghost_batch_norm` has the kernels normalize each, and
averages the statistics of all into the running ones.
"""

from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.ghost.kernels import (
    Maybe,
    Run,
    average_in_place,
    looks_into_operations,
    normalize,
    normalize_over_ranks,
    weights_of_ghosts,
)
from lightning_gap.ranks.group import RankGroup

__all__ = ["Grouping", "RunningStats", "ghost_batch_norm", "ghost_slices"]

RunningStats = Literal["sequential", "per_step"]
Grouping = Literal["contiguous", "strided"]
# Here: compilers of older torch trace no get_args.
_RUNNING_STATS, _GROUPINGS = get_args(RunningStats), get_args(Grouping)


def check_settings(ghost_batch_size: object, running_stats: object, grouping: object) -> None:
    """Raise unless the three arguments that describe ghost batches are usable."""
    what = "the samples that share statistics, in the paper the small batch size, 128"
    check_integer("ghost_batch_size", ghost_batch_size, what=what)
    check_choice("running_stats", running_stats, _RUNNING_STATS)
    check_choice("grouping", grouping, _GROUPINGS)


def check_rows_per_sample(rows_per_sample: object) -> None:
    """Raise unless ``rows_per_sample`` is a positive int."""
    check_integer("rows_per_sample", rows_per_sample, what="the rows of a layer's input that are one sample")


def rank_group(process_group: ProcessGroup | RankGroup) -> RankGroup:
    """Return a process group, or what is one already, as a :class:`~lightning_gap.ranks.group.RankGroup`."""
    return process_group if isinstance(process_group, RankGroup) else RankGroup(process_group)


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
    rows_per_sample: int = 1,
    num_batches_tracked: Tensor | None = None,
    process_group: ProcessGroup | RankGroup | None = None,
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
        rows_per_sample: Rows of ``x`` that are one sample, such as its tokens where x is (B·N, C), N for each of B
            samples: a sample's rows follow each other, and are in one ghost.
        num_batches_tracked: Scalar count of the updates so far, increased in place: by G if sequential, by 1 if per
            step. Needed by ``momentum=None``.
        process_group: Ranks whose samples, all together, are one ghost, for batches that are smaller than a ghost. The
            caller sees to it that they add up to ``ghost_batch_size``; a rank may have more of them than another, or
            none. Each rank of the group must make the same calls, backward passes included; one collective each, and
            two to three under transforms and for second derivatives. ``torch.compile`` breaks its graph here.

    Returns:
        The normalized tensor, of the shape and dtype of ``x``.

    Raises:
        TypeError: If ``ghost_batch_size`` is not an int.
        ValueError: If an argument is out of range, if each ghost would have one value per channel, or if strided ghosts
            are asked of rows that are no whole samples.

    References:
        Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in large batch
        training of neural networks", 2017, Algorithm 1.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
        >>> ghost_batch_norm(x, None, None, ghost_batch_size=2).flatten().round().tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """
    check_settings(ghost_batch_size, running_stats, grouping)
    if rows_per_sample != 1:
        check_rows_per_sample(rows_per_sample)
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

    running = _Running(running_mean, running_var, momentum, running_stats, num_batches_tracked)
    if process_group is not None:
        ranks = rank_group(process_group)
        if ranks.size > 1:
            spanning: tuple[Tensor, Tensor, Tensor] = normalize_over_ranks(x, weight, bias, eps, ranks)
            _update(running, *spanning[1:])
            return spanning[0]
    n, values = x.shape[0], prod(x.shape[2:])
    if n <= ghost_batch_size * rows_per_sample or x.numel() == 0:
        return _one_ghost(x, weight, bias, eps, running)
    if rows_per_sample != 1 and grouping == "strided":
        # Samples are dealt out, not rows: their rows become positions.
        if n % rows_per_sample:
            raise ValueError(
                f"strided ghosts need whole samples, got {n} rows with rows_per_sample={rows_per_sample}: use "
                "grouping='contiguous', or the rows that each sample has"
            )
        samples = x.unflatten(0, (n // rows_per_sample, rows_per_sample)).movedim(1, 2)
        y = ghost_batch_norm(
            samples, running_mean, running_var, weight, bias, ghost_batch_size=ghost_batch_size, momentum=momentum,
            eps=eps, running_stats=running_stats, grouping=grouping, num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        return y.movedim(2, 1).flatten(0, 1)
    ghost_batch_size = ghost_batch_size * rows_per_sample
    if ghost_batch_size == values == 1:
        raise ValueError(
            f"Expected more than 1 value per channel in each ghost batch when training, got input size "
            f"{tuple(x.shape)} and ghost_batch_size=1: raise ghost_batch_size"
        )
    full, rest = n // ghost_batch_size, n % ghost_batch_size  # divmod is not for symbolic sizes
    lone = rest * values == 1
    if full == 1 and lone:
        return _one_ghost(x, weight, bias, eps, running)
    order = None
    if lone and grouping == "strided":
        # The last sample joins the first ghost: a view cannot say so.
        order = torch.arange(n, device=x.device).remainder(full).argsort(stable=True)
        x = x.index_select(0, order)
    y, mean, var = normalize(x, weight, bias, eps, _runs(full, rest, ghost_batch_size, lone, grouping))
    if order is not None:
        y = y.index_select(0, order.argsort())
    _update(running, mean, var)
    return y


class _Running(NamedTuple):
    """Running statistics, and how they are averaged."""

    mean: Maybe
    var: Maybe
    momentum: float | None
    running_stats: RunningStats
    updates: Maybe


def _runs(full: int, rest: int, size: int, lone: bool, grouping: Grouping) -> list[Run]:
    """Return the partition of :func:`ghost_slices` as stretches of equal ghosts; numbers may be symbolic."""
    whole = full * size
    strided = grouping == "strided"
    if not lone:
        return [Run(0, whole, full, strided)] + ([Run(whole, whole + rest, 1)] if rest else [])
    if strided:  # already in the order of the ghosts, the first of which has one more
        return [Run(0, size + 1, 1), Run(size + 1, whole + 1, full - 1)]
    return [Run(0, whole - size, full - 1), Run(whole - size, whole + 1, 1)]


def _update(running: _Running, mean: Tensor, var: Tensor) -> None:
    """Average the statistics (ghosts, C) into the running ones."""
    running_mean, running_var, momentum, running_stats, num_batches_tracked = running
    ghosts = mean.shape[0]
    new = ghosts if running_stats == "sequential" else 1
    followed = looks_into_operations()
    updates = num_batches_tracked
    if updates is not None:
        updates = updates + new if followed else updates.add_(new)
    if running_mean is None or running_var is None:
        return
    if momentum is not None and not followed and not torch.compiler.is_compiling():
        keep = _kept(momentum, ghosts, running_stats)
        if average_in_place(mean, var, running_mean, running_var, keep):
            return
    weights, decay = _average_weights(ghosts, momentum, running_stats, updates, mean)
    means, variances = (
        running.to(stat.dtype).mul(decay).addmv(stat.t(), weights)
        for running, stat in ((running_mean, mean), (running_var, var))
    )
    try:
        running_mean.copy_(means)
        running_var.copy_(variances)
        if followed and num_batches_tracked is not None:
            num_batches_tracked.copy_(num_batches_tracked + new)
    except RuntimeError as error:
        if not followed:
            raise
        raise RuntimeError(
            "ghost batch normalization updates its running statistics in place, which a transform of torch.func allows "
            "only for buffers that it knows: pass them to torch.func.functional_call (for vmap one set for each "
            "element, as torch.func.stack_module_state makes), or use track_running_stats=False, or eval()"
        ) from error


def _one_ghost(x: Tensor, weight: Maybe, bias: Maybe, eps: float, running: _Running) -> Tensor:
    """Normalize as ``torch.nn.BatchNorm`` does, bit for bit but where that would wait, or transforms look in."""
    running_mean, running_var, momentum, _, num_batches_tracked = running
    waits = momentum is None and num_batches_tracked is not None and num_batches_tracked.device.type != "cpu"
    if running_mean is not None and x.numel() and (waits or looks_into_operations()):
        if x.shape[0] * prod(x.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        y, mean, var = normalize(x, weight, bias, eps, [Run(0, x.shape[0], 1)])
        _update(running._replace(running_stats="sequential"), mean, var)
        return y
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
    keep = _kept(momentum, ghosts, running_stats)
    return weights_of_ghosts(ghosts, keep, like), keep**ghosts


def _kept(momentum: float, ghosts: int, running_stats: RunningStats) -> float:
    """Return what share of a running statistic stays as one ghost's is averaged into it."""
    return 1 - momentum if running_stats == "sequential" else (1 - momentum) ** (1 / ghosts)
