"""Multiplicative gradient noise: samples weighted at random, so that a large batch varies like a small one."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gap.trainer.internals.of_torch import BatchNormBase, tree_leaves

__all__ = ["SampleNoise", "mixing_layers", "noise_variance", "output_module", "sample_weights"]


def noise_variance(ratio: float) -> float:
    r"""Return the variance of the samples' weights that gives a large batch the gradient noise of a small one.

    With weights :math:`z_n \sim N(1, \sigma^2)` the gradient :math:`\frac{1}{|B_L|} \sum_n z_n g_n` has the second
    moments of :math:`(1 + \sigma^2) / |B_L|` samples, so those of the small batch for

    .. math:: \sigma^2 = |B_L| / |B_S| - 1.

    Args:
        ratio: The batch that runs over the reference batch, at least 1.

    Raises:
        ValueError: If the ratio is below 1: noise can be added, not taken away.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", section 4.

    Example:
        >>> noise_variance(32)
        31.0
    """
    if ratio < 1:
        raise ValueError(
            f"gradient_noise needs a batch of at least reference_batch_size, and the ratio is {ratio:g}: a smaller "
            "batch is noisier already."
        )
    return float(ratio - 1)


def sample_weights(rows: int, variance: float, *, seed: Sequence[int]) -> Tensor:
    r"""Draw the weights :math:`z_n \sim N(1, \sigma^2)` of some samples, the same for the same seed.

    No generator of torch's is touched, so there is none to save either: the seed says which draw it is.

    Args:
        rows: How many samples.
        variance: Their variance, :math:`\sigma^2`.
        seed: Whole numbers that name the draw: of the run, the rank, the batch.

    Returns:
        A float32 tensor of shape ``(rows,)`` on the CPU.

    Example:
        >>> bool((sample_weights(4, 3.0, seed=(0, 1)) == sample_weights(4, 3.0, seed=(0, 1))).all())
        True
        >>> bool((sample_weights(4, 3.0, seed=(0, 1)) == sample_weights(4, 3.0, seed=(0, 2))).any())
        False
    """
    state = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]) >> 1
    normal: Tensor = torch.randn(rows, generator=torch.Generator().manual_seed(state), device="cpu")
    return normal.mul_(variance**0.5).add_(1)


def output_module(model: nn.Module, name: bool | str) -> nn.Module:
    """Return the part of a model whose output has one row a sample, by its name or as the only trainable child.

    Example:
        >>> model = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": nn.MSELoss()})
        >>> output_module(model, True)
        Linear(in_features=2, out_features=2, bias=True)
    """
    if isinstance(name, str):
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"gradient_noise={name!r} is not a submodule of {type(model).__name__}: {error}") from None
    trained = {
        child: module
        for child, module in model.named_children()
        if any(parameter.requires_grad for parameter in module.parameters())
    }
    if len(trained) != 1:
        raise ValueError(
            f"gradient_noise=True needs one child of {type(model).__name__} with weights to train, and there are "
            f"{list(trained)}. Name the last module before the loss, whose output has one row a sample: "
            "gradient_noise='head'."
        )
    return next(iter(trained.values()))


def mixing_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that normalize over the batch now, by name: there a sample has no gradient of its own.

    BatchNorm of every kind, ghost and synchronized too, in training mode or without running statistics. What a module
    of your own, a call of ``torch.nn.functional.batch_norm`` or the loss mixes cannot be told.

    Example:
        >>> list(mixing_layers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.InstanceNorm1d(2))))
        ['1']
        >>> mixing_layers(nn.BatchNorm1d(2).eval())
        {}
    """
    return {name: layer for name, layer in model.named_modules() if _mixes(layer)}


def _mixes(layer: nn.Module) -> bool:
    if isinstance(layer, torch.jit.ScriptModule):  # its class is gone, its name is kept
        named = str(getattr(layer, "original_name", "")).partition("BatchNorm")
        normalizes = bool(named[1]) and hasattr(layer, "running_mean")
    else:
        normalizes = isinstance(layer, BatchNormBase)
    return normalizes and (layer.training or getattr(layer, "running_mean", None) is None)


class SampleNoise:
    r"""Weights each sample's gradient by :math:`z_n \sim N(1, \sigma^2)`, where it enters a module's output.

    The gradient of a mean of losses :math:`\ell_n(f(x_n))` with respect to the output's row n is multiplied by
    :math:`z_n`, so every weight before the output gets :math:`\frac1B \sum_n z_n g_n`, and no loss changes.

    Example:
        >>> net = nn.Linear(3, 1)
        >>> noise = SampleNoise(net, 3.0, seed=0, rank=0)
        >>> net(torch.ones(5, 3)).sum().backward()
        >>> weights = sample_weights(5, 3.0, seed=(0, 0, 1))
        >>> bool(torch.allclose(net.weight.grad, weights.sum().expand(1, 3)))
        True
        >>> noise.remove()
    """

    def __init__(self, module: nn.Module, variance: float, *, seed: int, rank: int) -> None:
        self.variance, self.seed, self.rank, self.draws, self.calls = variance, seed, rank, 0, 0
        self._checked = False
        self._outputs: list[Tensor] = []
        self._handle = module.register_forward_hook(self._weigh)

    def _weigh(self, module: nn.Module, args: object, output: object) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        self._outputs = [
            leaf
            for leaf in tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
        ]
        rows = {leaf.shape[:1] for leaf in self._outputs}
        if len(rows) != 1 or rows == {torch.Size()}:
            shapes = [tuple(leaf.shape) for leaf in self._outputs]
            raise ValueError(
                f"gradient_noise: the output of {type(module).__name__} must have one row a sample, and has the shapes "
                f"{shapes}. Name another module: gradient_noise='head'."
            )
        self.calls += 1
        self.draws += 1
        weights = sample_weights(rows.pop()[0], self.variance, seed=(self.seed, self.rank, self.draws))
        for leaf in self._outputs:
            column = weights.to(leaf, non_blocking=True).view(-1, *[1] * (leaf.ndim - 1))
            leaf.register_hook(lambda gradient, column=column: gradient * column)

    def new_batch(self) -> None:
        """Start to count :attr:`calls` anew."""
        self.calls = 0

    def check(self, model: nn.Module, loss: Tensor) -> None:
        """Refuse a loss that reaches a weight other than through the output, or samples that interact.

        The number of calls is looked at every time, the rest once.
        """
        if self.calls != 1:
            raise ValueError(
                f"gradient_noise: the module whose output is weighted ran {self.calls} times in a training step, and "
                "must run once. Name the last module before the loss: gradient_noise='head'."
            )
        outputs, self._outputs = self._outputs, []  # not to be kept until the next batch
        if self._checked:
            return
        self._checked = True
        if mixing := mixing_layers(model):
            raise ValueError(
                "gradient_noise: BatchNorm makes a sample's gradient depend on the others in its batch, so it cannot "
                f"be weighted by itself. Use another normalization for {next(iter(mixing))!r}, or scale the learning "
                "rate instead."
            )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        past = sorted(names.get(id(leaf), "?") for leaf in _leaves_before(loss, outputs))
        if past:
            raise ValueError(
                f"gradient_noise: the loss reaches {', '.join(past[:3])}{' and others' if past[3:] else ''} other than "
                "through the output that is weighted. Name the last module before the loss (gradient_noise='head'), "
                "and leave penalties on the weights to the optimizer's weight_decay."
            )

    def remove(self) -> None:
        """Stop weighting."""
        self._handle.remove()


def _leaves_before(loss: Tensor, outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the leaves that the loss reaches in its graph by ways that avoid the outputs."""
    seen = {output.grad_fn for output in outputs}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the node that accumulates a leaf's gradient
            yield node.variable
        waiting += [before for before, _ in node.next_functions]
