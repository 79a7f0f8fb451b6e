"""Multi-layer perceptrons, and how their widths and activations are named."""

from collections.abc import Callable, Sequence

from torch import nn

from lightning_gap.checks import check_integer

__all__ = ["Activation", "activation_factory", "check_widths", "linear", "perceptron"]

Activation = str | Callable[[], nn.Module]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
_NAMES = {cls: name for name, cls in _ACTIVATIONS.items()}


def check_widths(dim: int, hidden: object) -> tuple[int, ...]:
    """Return the widths of the hidden layers as a tuple."""
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise TypeError(f"hidden must be a sequence of widths, got {hidden!r}: write hidden=(128, 128)")
    check_integer("dim", dim)
    return tuple(check_integer("a width of hidden", width) for width in hidden)


def activation_factory(activation: Activation) -> tuple[Callable[[], nn.Module], str | None]:
    """Return what makes the activation, and its name, which a checkpoint can hold; ``None`` for one without a name."""
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"unknown activation {activation!r}: choose one of {', '.join(_ACTIVATIONS)}, or give a class"
            )
        return _ACTIVATIONS[activation], activation
    if not callable(activation) or isinstance(activation, nn.Module):
        raise TypeError(f"activation must be a name or make a module, got {activation!r}: write 'gelu' or nn.GELU")
    return activation, _NAMES.get(activation) if isinstance(activation, type) else None


def linear(n_in: int, n_out: int, *, zero: bool = False, bias: bool = True) -> nn.Linear:
    """Return a linear layer that keeps the scale of activations, or starts at zero."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    # LeCun's normal initialization keeps the scale of the activations; torch's default shrinks them.
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=n_in**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def perceptron(
    n_in: int, hidden: Sequence[int], n_out: int, activation: Callable[[], nn.Module], *, zero: bool
) -> nn.Sequential:
    """Return a multi-layer perceptron."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [linear(n_in, width), activation()]
        n_in = width
    return nn.Sequential(*layers, linear(n_in, n_out, zero=zero))
