"""Kernels of ghost batch normalization: one partition of a batch, several ways to normalize over it.

A partition is a list of *runs*: stretches of the batch that hold equal ghosts. In eager mode a run goes to one of three
kernels, which all write into one output and give the same numbers:

* ``one by one``: native batch-norm kernels on each ghost, for ghosts that fill the cache;
* ``side by side``: elementwise operations on blocks of many small ghosts, where a call for each would cost more than
  its arithmetic;
* ``as channels``: strided ghosts of a dense batch are the channels of a view, which is one ghost to native kernels.

``torch.compile`` takes these kernels as one operator for images on a CPU. For other inputs it gets the defining
formula, which compilers fuse; so do ``torch.export``, other devices,
transforms of ``torch.func`` and forward-mode differentiation. Ghosts that span ranks are kernels of their
own, with one collective forward and one backward.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gap.ghost.transforms import looks_into_operations
from lightning_gap.ranks.group import RankGroup

__all__ = ["Run", "normalize", "normalize_over_ranks"]

# Elements of a ghost from which a native call for each pays, and of a block that a core's cache can hold: measured. The
# gradient of a large ghost takes blocks twice as large, for fewer calls.
_LARGE_GHOST = 1 << 17
_BLOCK = 1 << 18

Normalized = tuple[Tensor, Tensor, Tensor]  # output, means and unbiased variances (ghosts, channels)


class Run(NamedTuple):
    """Samples ``start`` to ``stop`` of a batch, which hold ``ghosts`` equal ghosts, contiguous or strided."""

    start: int
    stop: int
    ghosts: int
    strided: bool = False

    def split(self, samples: Tensor) -> Tensor:
        """Return the run of ``samples`` as (ghosts, size, ...), or (size, ghosts, ...) if strided."""
        size = (self.stop - self.start) // self.ghosts
        shape = (size, self.ghosts) if self.strided else (self.ghosts, size)
        run: Tensor = samples[self.start : self.stop].unflatten(0, shape)
        return run


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, runs: list[Run]) -> Normalized:
    """Normalize each ghost of ``x`` by its own statistics.

    Args:
        x: (N, C) or (N, C, ...).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.
        runs: The partition, which covers the batch in order.

    Returns:
        The output, and each ghost's mean and unbiased variance, (ghosts, C), detached.
    """
    opaque = x.device.type == "cpu" and x.dim() > 2 and torch.compiler.is_dynamo_compiling()
    traced = torch.compiler.is_compiling() and not opaque
    if x.device.type not in ("cpu", "cuda") or traced or looks_into_operations():
        return _formula(x, weight, bias, eps, runs)
    first, positions = runs[0], math.prod(x.shape[2:])
    large = (first.stop - first.start) // first.ghosts * positions * x.shape[1] >= _LARGE_GHOST
    if first.strided and large and positions > 1 and _channels_inside(x):
        # No native call takes these ghosts where they lie, and they fill the cache: two copies are cheaper.
        inside = x.movedim(1, -1)
        inside = _with_rest(first.split(inside).transpose(0, 1), inside[first.stop :])
        y, mean, var = normalize(inside.movedim(-1, 1), weight, bias, eps, [first._replace(strided=False), *runs[1:]])
        inside = y.movedim(1, -1)
        dealt = first._replace(strided=False).split(inside).transpose(0, 1)
        return _with_rest(dealt, inside[first.stop :]).movedim(-1, 1), mean, var
    weight, bias = _in_statistics_dtype(x, weight, bias)
    if opaque:
        numbers = [number for run in runs for number in (run.start, run.stop, run.ghosts, int(run.strided))]
        y, mean, var, _ = _ghost_norm(_dense(x), weight, bias, eps, numbers)
        return y, mean.detach(), var.detach()
    y, mean, var, _ = _GhostNorm.apply(_dense(x), weight, bias, eps, runs)  # type: ignore[no-untyped-call]
    return y, mean, var


def _with_rest(ghosts: Tensor, rest: Tensor) -> Tensor:
    samples = ghosts.flatten(0, 1)
    return torch.cat((samples, rest)) if len(rest) else samples


@torch.compiler.disable  # type: ignore[untyped-decorator]
def normalize_over_ranks(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: RankGroup
) -> Normalized:
    """Normalize all samples of all ``ranks`` as one ghost; collective, in the backward pass too.

    Args:
        x: This rank's samples, (N, C) or (N, C, ...); as many as it has, none included.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.
        ranks: The ranks that share the ghost.

    Returns:
        This rank's output, and the ghost's mean and unbiased variance, (1, C), detached.
    """
    if looks_into_operations():
        return _formula_over_ranks(x, weight, bias, eps, ranks)
    weight, bias = _in_statistics_dtype(x, weight, bias)
    y, mean, var, *_ = _RankGhostNorm.apply(_dense(x), weight, bias, eps, ranks)  # type: ignore[no-untyped-call]
    return y, mean, var


# --- The formula ---------------------------------------------------------------------------------------------------


def _formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, runs: list[Run]) -> Normalized:
    results = [_formula_of_run(run.split(x), run.strided, weight, bias, eps) for run in runs]
    y, mean, var = results[0] if len(results) == 1 else map(torch.cat, zip(*results, strict=True))
    return y, mean.detach(), var.detach()


def _formula_of_run(
    ghosts: Tensor, strided: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Normalized:
    samples = int(not strided)
    over = [samples, *range(3, ghosts.dim())]
    wide = ghosts.to(_statistics_dtype(ghosts))
    var, mean = torch.var_mean(wide, over, correction=0, keepdim=True)
    y = (wide - mean) * torch.rsqrt(var + eps)
    per_channel = (-1, *(1,) * (ghosts.dim() - 3))
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    values = ghosts.shape[samples] * math.prod(ghosts.shape[3:])
    mean, var = (t.reshape(ghosts.shape[1 - samples], ghosts.shape[2]) for t in (mean, var * (values / (values - 1))))
    return y.flatten(0, 1).to(ghosts.dtype), mean, var


def _formula_over_ranks(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: RankGroup
) -> Normalized:
    over, per_channel = [0, *range(2, x.dim())], (-1, *(1,) * (x.dim() - 2))
    wide = x.to(_statistics_dtype(x))
    values = math.prod(x.shape[i] for i in over)
    own = [torch.full((), n, dtype=wide.dtype, device=wide.device) for n in (values, ranks.layer)]  # no vmap's
    every = ranks.gather(torch.stack(own))
    ranks.check_layers(every[:, 1])
    count = every[:, 0].sum()
    _refuse_one_value(count, ranks)
    mean = ranks.differentiable_sum(wide.sum(over)) / count
    centred = wide - mean.view(per_channel)
    var = ranks.differentiable_sum(centred.square().sum(over)) / count
    y = centred * torch.rsqrt(var + eps).view(per_channel)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype), mean.detach()[None], (var.detach() * (count / (count - 1)))[None]


def _refuse_one_value(count: Tensor, ranks: RankGroup) -> None:
    if count.device.type == "cpu" and count <= 1:  # a GPU is not waited for
        raise ValueError(f"Expected more than 1 value per channel in a ghost over {ranks.size} ranks when training")


# --- Layouts -------------------------------------------------------------------------------------------------------


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _in_statistics_dtype(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Float32 scale and shift beside a half-precision input make the native kernels keep float32 statistics."""
    dtype = _statistics_dtype(x)
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in parameters]


def _channels_inside(x: Tensor) -> bool:
    """Whether the channels of a sample's position lie side by side: (N, C), channels_last, a transposed sequence."""
    return x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if _channels_inside(x) else x.contiguous()


def _flat(t: Tensor, channels_inside: bool) -> Tensor:
    """Return a dense view (rows, C), or (samples, C, positions)."""
    return t.movedim(1, -1).reshape(-1, t.shape[1]) if channels_inside else t.flatten(2)


def _like(t: Tensor, channels_inside: bool) -> Tensor:
    """Return ``t``, such as a gradient, dense and in the wanted order of dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_inside else t.contiguous()


def _block(x: Tensor) -> int:
    """Return how many elements to take at a time: what the caches hold, or on a GPU, without such caches, all."""
    return _BLOCK * torch.get_num_threads() if x.device.type == "cpu" else max(1, x.numel())


class _Part(NamedTuple):
    """A run of a batch, and the kernel for it."""

    run: Run
    rows: slice  # of the flat view
    ghosts: slice  # of the tables of statistics
    kernel: "_Kernel"


def _parts(flat: Tensor, runs: list[Run]) -> list[_Part]:
    parts, first = [], 0
    per_sample = len(flat) // runs[-1].stop
    for run in runs:
        rows = slice(run.start * per_sample, run.stop * per_sample)
        ghost = flat[rows].numel() // run.ghosts
        if run.strided and per_sample == 1:
            kernel = _AS_CHANNELS
        elif run.ghosts == 1 or (ghost >= _LARGE_GHOST and not run.strided):
            kernel = _ONE_BY_ONE
        else:
            kernel = _SIDE_BY_SIDE
        parts.append(_Part(run, rows, slice(first, first + run.ghosts), kernel))
        first += run.ghosts
    return parts


# --- Kernels -------------------------------------------------------------------------------------------------------


class _Tables(NamedTuple):
    """What is known of some ghosts, each (ghosts, C)."""

    mean: Tensor
    var: Tensor
    invstd: Tensor


class _Kernel(NamedTuple):
    """How to normalize a run.

    ``forward(run, x, y, weight, bias, eps, tables)`` fills ``y`` and the tables. ``backward(run, x, grad_y, weight,
    tables, out)`` fills ``out``, if given, with the gradient of x, and returns those of weight and bias, (2, C).
    """

    forward: Callable[[Run, Tensor, Tensor, Tensor | None, Tensor | None, float, _Tables], None]
    backward: Callable[[Run, Tensor, Tensor, Tensor | None, _Tables, Tensor | None], Tensor]


def _forward_one_by_one(
    run: Run, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tables: _Tables
) -> None:
    rows = len(x) // run.ghosts
    parts = zip(x.split(rows), y.split(rows), *tables, strict=True)
    if not _positions_as_channels(x):
        for part, out, mean, var, invstd in parts:
            # With momentum 1 the kernel's running statistics are the batch's own mean and unbiased variance. They are
            # blended with what the buffers hold at weight 0, which must not be NaN: the tables come as zeros.
            torch.ops.aten.native_batch_norm.out(
                part, weight, bias, torch.zeros_like(mean), var, True, 1.0, eps,
                out=out, save_mean=mean, save_invstd=invstd,
            )  # fmt: skip
        return
    n = x.numel() // (run.ghosts * x.shape[1])
    one = torch.ones_like(tables.mean[0])
    for part, out, mean, var, invstd in parts:
        moments = _moments(part)
        mean.copy_(moments[0])
        var.copy_(moments[1])
        invstd.copy_(moments[1].add_(eps).rsqrt_())
        scale = invstd if weight is None else invstd * weight
        _native_transform(part, out, scale, bias, mean, one, 0.0)
    tables.var.mul_(n / (n - 1))


def _positions_as_channels(x: Tensor) -> bool:
    """Whether statistics are faster position by position: torch's CPU kernel for (N, C, L) is no vector code."""
    return x.dim() == 3 and x.device.type == "cpu"


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, in float64 where positions have been joined."""
    features = x.flatten(1) if _positions_as_channels(x) else x
    # Float32 buffers beside half-precision samples make float32 statistics.
    unused = features.new_zeros(2, features.shape[1], dtype=_statistics_dtype(x))
    means, variances = torch.batch_norm_update_stats(features, unused[0], unused[1], 0.0)
    if features is x:
        return means, variances
    means, variances = (t.view(x.shape[1], -1) for t in (means, variances))
    mean = means.mean(1, True, dtype=torch.float64)
    return mean[:, 0], (means - mean).square_().add_(variances).mean(1)


def _native_transform(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> None:
    """Write γ (x − μ) / √(σ² + ε) + β, as in evaluation."""
    # Two buffers: the CUDA kernel writes the mean and 1/σ there and normalizes with what it finds; a CPU's leaves them.
    save_mean, save_invstd = mean.new_empty(2, len(mean)).unbind()
    torch.ops.aten.native_batch_norm.out(
        x, weight, bias, mean, var, False, 0.0, eps, out=y, save_mean=save_mean, save_invstd=save_invstd
    )


def _native_sums(x: Tensor, grad_y: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ dy·(x − μ)/σ and Σ dy of each channel."""
    # The weight has no part in the sums; with half-precision inputs its dtype is that of the statistics.
    _, products, total = torch.ops.aten.native_batch_norm_backward(
        grad_y, x, mean, None, None, mean, invstd, True, 0.0, [False, True, True]
    )
    return products, total


def _input_gradient(x: Tensor, grad_y: Tensor, out: Tensor, scale: Tensor, slope: Tensor, shift: Tensor) -> None:
    """Write scale·dy + slope·x + shift, with one number of each for a channel."""
    rows = max(1, 2 * _block(x) // x[0].numel())
    native = _positions_as_channels(x) and x.dtype == scale.dtype
    zero, one = torch.zeros_like(shift), torch.ones_like(shift)
    wide = [t.view(-1, *(1,) * (x.dim() - 2)) for t in (scale, slope, shift)]
    for part, grad, target in zip(x.split(rows), grad_y.split(rows), out.split(rows), strict=True):
        if native:
            _native_transform(part, target, slope, shift, zero, one, 0.0)
            target.addcmul_(grad, wide[0])
        elif target.dtype == scale.dtype:
            torch.addcmul(wide[2], part, wide[1], out=target).addcmul_(grad, wide[0])
        else:
            target.copy_(torch.addcmul(wide[2], part, wide[1]).addcmul_(grad, wide[0]))


def _backward_one_by_one(
    run: Run, x: Tensor, grad_y: Tensor, weight: Tensor | None, tables: _Tables, out: Tensor | None
) -> Tensor:
    rows = len(x) // run.ghosts
    scale, slopes, shifts = _coefficients(weight, tables.invstd, x.numel() // (run.ghosts * x.shape[1]))
    sums = scale.new_empty(2, *scale.shape)
    for i, (part, grad) in enumerate(zip(x.split(rows), grad_y.split(rows), strict=True)):
        mean = tables.mean[i]
        products, total = _native_sums(part, grad, mean, tables.invstd[i])
        sums[0, i], sums[1, i] = products, total
        if out is not None:
            slope = products * slopes[i]
            shift = torch.addcmul(total * shifts[i], slope, mean, value=-1)
            _input_gradient(part, grad, out[i * rows : (i + 1) * rows], scale[i], slope, shift)
    return sums.sum(1)


def _coefficients(weight: Tensor | None, invstd: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what makes the gradient of x of its two sums.

    It is a·dy + b·(x − μ) + c, with a = γ/σ, b = −a/(σn) for each unit of Σ dy·x̂ and c = −a/n for each of Σ dy.
    """
    scale = invstd if weight is None else invstd * weight
    shift = scale / -n
    return scale, shift * invstd, shift


class _Blocks:
    """Blocks of small ghosts: their samples, and their statistics, in shapes that broadcast against each other.

    Positions are features beside the channels, so that all arithmetic is along long rows; only tables are joined.
    """

    over = (0, 2)  # of (samples apart, ghosts, rows together, features)

    def __init__(self, run: Run, flat: Tensor) -> None:
        self.ghosts, self.channels = run.ghosts, flat.shape[1]
        self.values = flat.numel() // (self.ghosts * self.channels)
        self.positions = math.prod(flat.shape[2:])
        apart = (run.stop - run.start) // run.ghosts if run.strided else 1
        together = len(flat) // (apart * run.ghosts)
        self.shape = (apart, run.ghosts, together, self.channels * self.positions)
        self.each = max(1, _block(flat) // (self.values * self.channels))

    def samples(self, flat: Tensor) -> tuple[Tensor, ...]:
        return self._split(flat.view(self.shape))

    def statistics(self, table: Tensor) -> tuple[Tensor, ...]:
        return self._split(table.view(1, self.ghosts, 1, self.channels))

    def _split(self, ghosts: Tensor) -> tuple[Tensor, ...]:
        return (ghosts,) if self.each >= self.ghosts else tuple(ghosts.split(self.each, 1))

    def sum(self, samples: Tensor, out: Tensor) -> Tensor:
        """Write the sums over each ghost's values."""
        if self.positions == 1:
            return torch.sum(samples, self.over, True, dtype=out.dtype, out=out)
        features = torch.sum(samples, self.over, True, dtype=out.dtype)
        return torch.sum(features.unflatten(-1, (self.channels, self.positions)), -1, out=out)

    def whole(self, table: Tensor) -> Tensor:
        """Return a table as statistics of all ghosts' features."""
        return self.spread(table.view(1, self.ghosts, 1, self.channels))

    def spread(self, statistics: Tensor) -> Tensor:
        """Return statistics of channels as those of features."""
        return statistics if self.positions == 1 else statistics.repeat_interleave(self.positions, -1)


def _forward_side_by_side(
    run: Run, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tables: _Tables
) -> None:
    blocks = _Blocks(run, x)
    n, samples, (mean, var, invstd) = blocks.values, blocks.samples(x), tables
    squared = torch.empty_like(samples[0], dtype=mean.dtype)
    for part, means, squares in zip(samples, blocks.statistics(mean), blocks.statistics(var), strict=True):
        blocks.sum(part, means).div_(n)
        scratch = squared[:, : part.shape[1]]
        torch.ops.aten.mse_loss.out(part, blocks.spread(means), _EACH, out=scratch)  # (x − μ)² in one pass
        blocks.sum(scratch, squares)
    torch.add(var.div_(n), eps, out=invstd).rsqrt_()
    var.mul_(n / (n - 1))
    scale = invstd if weight is None else invstd * weight
    shift = torch.addcmul(mean.new_zeros(1) if bias is None else bias, mean, scale, value=-1)
    _addcmul(blocks.whole(shift), x.view(blocks.shape), blocks.whole(scale), y.view(blocks.shape))


_EACH = 0  # at::Reduction::None


def _addcmul(shift: Tensor, x: Tensor, scale: Tensor, out: Tensor) -> None:
    if out.dtype == scale.dtype:
        torch.addcmul(shift, x, scale, out=out)
    else:
        out.copy_(torch.addcmul(shift, x, scale))


def _backward_side_by_side(
    run: Run, x: Tensor, grad_y: Tensor, weight: Tensor | None, tables: _Tables, out: Tensor | None
) -> Tensor:
    blocks = _Blocks(run, x)
    scale, slope, shift = _coefficients(weight, tables.invstd, blocks.values)
    sums = scale.new_empty(2, *scale.shape)
    products, totals = sums
    parts, grads = blocks.samples(x), blocks.samples(grad_y)
    buffer = torch.empty_like(parts[0], dtype=scale.dtype)
    statistics = map(blocks.statistics, (tables.mean, products, totals))
    alike = x.dtype == grad_y.dtype == scale.dtype  # older torch's loss kernel takes no other
    for part, grad, mean, product, total in zip(parts, grads, *statistics, strict=True):
        scratch = buffer[:, : part.shape[1]]
        if alike:
            torch.ops.aten.mse_loss_backward.grad_input(grad, part, blocks.spread(mean), _EACH, grad_input=scratch)
        else:
            torch.sub(part, blocks.spread(mean), out=scratch).mul_(grad)
        blocks.sum(scratch, product)  # of (x − μ)·dy, or twice that, in one pass
        blocks.sum(grad, total)
    products.mul_(tables.invstd / 2 if alike else tables.invstd)
    if out is not None:
        slope *= products
        shift = torch.addcmul(shift.mul_(totals), slope, tables.mean, value=-1)
        factors = [blocks.whole(t).split(blocks.each, 1) for t in (shift, slope, scale)]
        for part, grad, target, c, b, a in zip(parts, grads, blocks.samples(out), *factors, strict=True):
            into = target if target.dtype == scale.dtype else buffer[:, : part.shape[1]]
            torch.addcmul(c, part, b, out=into).addcmul_(grad, a)
            if into is not target:
                target.copy_(into)
    return sums.sum(1)


def _forward_as_channels(
    run: Run, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, tables: _Tables
) -> None:
    weight, bias = (t if t is None else t.repeat(run.ghosts) for t in (weight, bias))
    one, shape = run._replace(ghosts=1), _shape_as_channels(run, x)
    _forward_one_by_one(one, x.view(shape), y.view(shape), weight, bias, eps, _flat_tables(tables))


def _backward_as_channels(
    run: Run, x: Tensor, grad_y: Tensor, weight: Tensor | None, tables: _Tables, out: Tensor | None
) -> Tensor:
    if not _positions_as_channels(x):
        grad_x, sums = _gradients_as_channels(run, x, grad_y, weight, tables, out is not None)
        if out is not None:
            out.copy_(grad_x.view_as(out))
        return sums
    weight = weight if weight is None else weight.repeat(run.ghosts)
    one, shape = run._replace(ghosts=1), _shape_as_channels(run, x)
    out = out if out is None else out.view(shape)
    sums = _backward_one_by_one(one, x.view(shape), grad_y.view(shape), weight, _flat_tables(tables), out)
    return sums.view(2, run.ghosts, -1).sum(1)


def _gradients_as_channels(
    run: Run, x: Tensor, grad_y: Tensor, weight: Tensor | None, tables: _Tables, wanted: bool
) -> tuple[Tensor, Tensor]:
    shape = _shape_as_channels(run, x)
    scale = tables.mean.new_ones(x.shape[1]) if weight is None else weight
    grad_x, *sums = torch.ops.aten.native_batch_norm_backward(
        grad_y.view(shape), x.view(shape), scale.repeat(run.ghosts), None, None,
        tables.mean.view(-1), tables.invstd.view(-1), True, 0.0, [wanted, True, True],
    )  # fmt: skip
    return grad_x, torch.stack(sums).view(2, run.ghosts, -1).sum(1)


def _flat_tables(tables: _Tables) -> _Tables:
    return _Tables(*(t.view(1, -1) for t in tables))


def _shape_as_channels(run: Run, x: Tensor) -> tuple[int, ...]:
    # Sample k·ghosts + s is row k, channels s·C .. s·C + C-1 of this view.
    return len(x) // run.ghosts, run.ghosts * x.shape[1], *x.shape[2:]


_ONE_BY_ONE = _Kernel(_forward_one_by_one, _backward_one_by_one)
_SIDE_BY_SIDE = _Kernel(_forward_side_by_side, _backward_side_by_side)
_AS_CHANNELS = _Kernel(_forward_as_channels, _backward_as_channels)


# --- Differentiation -----------------------------------------------------------------------------------------------


class _GhostNorm(torch.autograd.Function):
    """The eager kernels; a second derivative goes through the formula."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, runs: list[Run]
    ) -> tuple[Tensor, ...]:
        y, inside = torch.empty_like(x), _channels_inside(x)
        ghosts = sum(run.ghosts for run in runs)
        tables = [x.new_zeros(ghosts, x.shape[1], dtype=_statistics_dtype(x)) for _ in range(3)]
        flat = _flat(x, inside)
        flat_y = _flat(y, inside)
        for run, rows, which, kernel in _parts(flat, runs):
            kernel.forward(run, flat[rows], flat_y[rows], weight, bias, eps, _Tables(*(t[which] for t in tables)))
        return y, *tables

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.eps, ctx.runs = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *tables = ctx.saved_tensors
        if torch.is_grad_enabled() or looks_into_operations(grad_y):
            gradients = _gradients_of_formula(
                lambda: _formula(x, weight, bias, ctx.eps, ctx.runs)[0], ctx, (x, weight, bias), grad_y
            )
            return *gradients, None, None
        grad_x, total = _gradients(x, grad_y, weight, _Tables(*tables), ctx.runs, ctx.needs_input_grad[0])
        return grad_x, *_where_wanted(ctx, total), None, None


def _gradients(
    x: Tensor, grad_y: Tensor, weight: Tensor | None, tables: _Tables, runs: list[Run], wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradient of x, if wanted, and those of weight and bias, (2, C)."""
    inside = _channels_inside(x)
    flat = _flat(x, inside)
    flat_grad = _flat(_like(grad_y, inside), inside)
    parts = _parts(flat, runs)
    if len(parts) == 1 and parts[0].kernel is _AS_CHANNELS and not _positions_as_channels(flat):
        grad_x, total = _gradients_as_channels(parts[0].run, flat, flat_grad, weight, tables, wanted)
        return grad_x.view_as(x) if wanted else None, total  # the gradient is the whole: no copy
    own = torch.empty_like(x) if wanted else None
    out = None if own is None else _flat(own, inside)
    total = tables.mean.new_zeros(2, x.shape[1])
    for run, rows, which, kernel in parts:
        target = None if out is None else out[rows]
        part = _Tables(*(t[which] for t in tables))
        total += kernel.backward(run, flat[rows], flat_grad[rows], weight, part, target)
    return own, total


def _gradients_of_formula(
    formula: Callable[[], Tensor], ctx: Any, inputs: tuple[Tensor | None, ...], grad_y: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the inputs that need one, differentiable again where autograd asks for that."""
    wanted = ctx.needs_input_grad[: len(inputs)]
    leaves = [t for t, yes in zip(inputs, wanted, strict=True) if t is not None and yes]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = formula()
    gradients = iter(torch.autograd.grad(y, leaves, grad_y, create_graph=again))
    return [next(gradients) if yes else None for yes in wanted]


def _where_wanted(ctx: Any, gradients: Tensor) -> list[Tensor | None]:
    wanted = ctx.needs_input_grad[1:3]
    return [gradient if yes else None for yes, gradient in zip(wanted, gradients, strict=True)]


# The same as one operator for torch.compile: its own CPU code for the statistics of images takes longer. A run is four
# numbers here. Schemas are written out: what annotations they can be inferred from differs among torch's versions.


@torch.library.custom_op(
    "lightning_gap::ghost_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, SymInt[] runs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _ghost_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, runs: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, var, invstd = _GhostNorm.forward(x, weight, bias, eps, _decoded(runs))
    return y, mean, var, invstd


@_ghost_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, runs: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var, invstd = (x.new_empty(sum(runs[2::4]), x.shape[1], dtype=_statistics_dtype(x)) for _ in range(3))
    return torch.empty_like(x), mean, var, invstd


@torch.library.custom_op(
    "lightning_gap::ghost_norm_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor grad_y, Tensor? weight, Tensor mean, Tensor invstd, SymInt[] runs, bool wanted)"
    " -> (Tensor, Tensor)",
)
def _ghost_norm_backward(
    x: Tensor, grad_y: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, runs: list[int], wanted: bool
) -> tuple[Tensor, Tensor]:
    grad_x, total = _gradients(x, grad_y, weight, _Tables(mean, mean, invstd), _decoded(runs), wanted)
    return x.new_empty(0) if grad_x is None else grad_x, total


@_ghost_norm_backward.register_fake
def _(
    x: Tensor, grad_y: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, runs: list[int], wanted: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if wanted else x.new_empty(0), mean.new_empty(2, x.shape[1])


def _decoded(runs: list[int]) -> list[Run]:
    return [Run(runs[i], runs[i + 1], runs[i + 2], bool(runs[i + 3])) for i in range(0, len(runs), 4)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.runs = inputs
    _, mean, _, invstd = output
    ctx.save_for_backward(x, weight, mean, invstd)


def _backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, invstd = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    grad_x, total = _ghost_norm_backward(x, grad_y, weight, mean, invstd, ctx.runs, wanted)
    return grad_x if wanted else None, *_where_wanted(ctx, total), None, None


_ghost_norm.register_autograd(_backward, setup_context=_remember)


class _RankGhostNorm(torch.autograd.Function):
    """One ghost over several ranks: its moments are gathered forward, its two sums of gradients are added backward.

    A second derivative goes through the formula.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: RankGroup
    ) -> tuple[Tensor, ...]:
        y, inside, channels = torch.empty_like(x), _channels_inside(x), x.shape[1]
        flat = _flat(x, inside)
        values = flat.numel() // channels
        mean, var = flat.new_zeros(2, channels, dtype=_statistics_dtype(x))
        if values:
            mean, var = (t.to(mean.dtype) for t in _moments(flat))
        # Which layer and how many values, then the moments, of one length: ranks that have met different layers are
        # told, and do not read each other's numbers.
        spare = mean.new_zeros(2 * max(0, ranks.channels - channels))
        own = torch.cat((mean.new_full((1,), ranks.layer), mean.new_full((1,), values), mean, var * values, spare))
        every = ranks.gather(own)
        ranks.check_layers(every[:, 0])
        counts, means, squares = every[:, 1:].split((1, channels, channels, len(spare)), 1)[:3]
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        squares = (squares + counts * (means - mean) ** 2).sum(0)  # Welford's, for parts of any size
        _refuse_one_value(count, ranks)
        var, unbiased = squares / count, squares / (count - 1)
        if values:
            flat_y = _flat(y, inside)
            _native_transform(flat, flat_y, weight, bias, mean, var, eps)
        return y, mean[None], unbiased[None], (var + eps).rsqrt(), count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.eps, ctx.ranks = inputs
        _, mean, _, invstd, count = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, mean, invstd, count)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, count = ctx.saved_tensors
        if torch.is_grad_enabled() or looks_into_operations(grad_y):
            gradients = _gradients_of_formula(
                lambda: _formula_over_ranks(x, weight, bias, ctx.eps, ctx.ranks)[0], ctx, (x, weight, bias), grad_y
            )
            return *gradients, None, None
        inside, mean = _channels_inside(x), mean[0]
        flat = _flat(x, inside)
        flat_grad = _flat(_like(grad_y, inside), inside)
        own = mean.new_zeros(2, len(mean))
        if flat.numel():
            own = torch.stack(_native_sums(flat, flat_grad, mean, invstd))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            products, total = ctx.ranks.sum(own)
            if flat.numel():
                scale, slope, shift = _coefficients(weight, invstd, count)
                slope = products * slope
                shift = torch.addcmul(total * shift, slope, mean, value=-1)
                _input_gradient(flat, flat_grad, _flat(grad_x, inside), scale, slope, shift)
        # Of weight and bias this rank's share: the strategy adds them up.
        return grad_x, *_where_wanted(ctx, own), None, None
