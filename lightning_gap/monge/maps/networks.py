"""The networks inside maps: perceptrons, perceptrons modulated by a condition, and gradients of potentials."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.checks import check_integer

__all__ = [
    "Activation",
    "ConditionalPerceptron",
    "Conditioning",
    "PotentialGradient",
    "activation_factory",
    "check_condition",
    "check_labels",
    "check_widths",
    "network",
    "perceptron",
]

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


def _gelu_slope(u: Tensor) -> Tensor:
    return (1 + torch.erf(u * math.sqrt(0.5))) / 2 + u * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)


def _silu_slope(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _tanh_slope(u: Tensor) -> Tensor:
    return 1 - torch.tanh(u).square()


# Activations that are differentiable twice, without which a potential's gradient cannot learn: function and slope.
_SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "silu": (F.silu, _silu_slope),
    "softplus": (F.softplus, torch.sigmoid),
    "tanh": (torch.tanh, _tanh_slope),
}


def check_widths(dim: int, hidden: object) -> tuple[int, ...]:
    """Return the widths of the hidden layers as a tuple.

    Args:
        dim: Dimension of the samples.
        hidden: Widths of the hidden layers.

    Raises:
        TypeError: ``hidden`` is no sequence.
        ValueError: A width, or ``dim``, is not a positive integer.
    """
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise TypeError(f"hidden must be a sequence of widths, got {hidden!r}: write hidden=(128, 128)")
    check_integer("dim", dim)
    return tuple(check_integer("a width of hidden", width) for width in hidden)


def activation_factory(activation: Activation) -> tuple[Callable[[], nn.Module], str | None]:
    """Return what makes the activation, and its name, which a checkpoint can hold; ``None`` for one without a name.

    Args:
        activation: A name such as ``"gelu"``, a class of ``torch.nn``, or a function that makes a module.

    Raises:
        ValueError: The name is not known.
        TypeError: It is none of these.
    """
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"unknown activation {activation!r}: choose one of {', '.join(_ACTIVATIONS)}, or give a class"
            )
        return _ACTIVATIONS[activation], activation
    if not callable(activation) or isinstance(activation, nn.Module):
        raise TypeError(f"activation must be a name or make a module, got {activation!r}: write 'gelu' or nn.GELU")
    return activation, _NAMES.get(activation) if isinstance(activation, type) else None


def _linear(n_in: int, n_out: int, *, zero: bool = False, bias: bool = True) -> nn.Linear:
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
    """Return a multi-layer perceptron.

    Args:
        n_in: Width of the input.
        hidden: Widths of the hidden layers.
        n_out: Width of the output.
        activation: Makes the activation between layers.
        zero: Whether the last layer, and so the output, starts at zero.
    """
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [_linear(n_in, width), activation()]
        n_in = width
    return nn.Sequential(*layers, _linear(n_in, n_out, zero=zero))


class Conditioning(nn.Module):
    r"""Turns a condition into a scale and a shift for every hidden layer, and a shift of the output.

    Feature-wise linear modulation (Perez et al. 2018, "FiLM"): a layer's :math:`u` becomes
    :math:`(1 + \gamma(c)) \odot u + \beta(c)`, with :math:`\gamma, \beta` linear in an embedding of :math:`c`. The
    shift of the output starts at zero, and so does :math:`\gamma`.

    Args:
        widths: Widths of the hidden layers.
        n_out: Width of the output.
        conditions: Number of categories, for labels ``0 .. conditions - 1``; or else
        condition_dim: Dimension of the vectors that are conditions.
        embedding_dim: Width of the embedding.

    Raises:
        ValueError: Not just one of ``conditions`` and ``condition_dim`` is given, or a number is not positive.
    """

    def __init__(
        self,
        widths: Sequence[int],
        n_out: int,
        *,
        conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int = 32,
    ) -> None:
        super().__init__()
        if (conditions is None) == (condition_dim is None):
            raise ValueError(
                "give one of conditions=, the number of categories, and condition_dim=, the dimension of vectors, "
                f"got conditions={conditions!r} and condition_dim={condition_dim!r}"
            )
        check_integer("embedding_dim", embedding_dim)
        self.embedding: nn.Module
        if conditions is not None:
            self.embedding = nn.Embedding(check_integer("conditions", conditions), embedding_dim)
        else:
            p = check_integer("condition_dim", condition_dim)
            self.embedding = nn.Sequential(_linear(p, embedding_dim), nn.SiLU())
        self.films = nn.ModuleList(_linear(embedding_dim, 2 * width) for width in widths)
        for film, width in zip(self.films, widths, strict=True):
            nn.init.zeros_(film.weight[:width])  # type: ignore[index]
        self.shift = _linear(embedding_dim, n_out, zero=True, bias=False)

    def forward(self, condition: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return scales and shifts of the hidden layers, and the shift of the output.

        Args:
            condition: ``(...)`` labels or ``(..., p)`` vectors.
        """
        embedded = self.embedding(condition)
        films = []
        for film in self.films:
            scale, shift = film(embedded).chunk(2, dim=-1)
            films.append((1 + scale, shift))
        return films, self.shift(embedded)


def check_condition(x: Tensor, condition: Tensor, conditions: int | None, condition_dim: int | None) -> None:
    """Raise ``ValueError`` unless there is one condition of the right kind for each sample.

    Args:
        x: ``(..., d)`` samples.
        condition: What was given with them.
        conditions: Number of categories, or ``None`` for vectors.
        condition_dim: Dimension of the vectors.
    """
    if conditions is None:
        expected = (*x.shape[:-1], condition_dim)
        if tuple(condition.shape) != expected or not condition.is_floating_point():
            raise ValueError(
                f"condition must be floating-point vectors of shape {expected}, one for each sample, "
                f"got {condition.dtype} of shape {tuple(condition.shape)}"
            )
        return
    if condition.shape != x.shape[:-1] or condition.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"condition must be integer labels of shape {tuple(x.shape[:-1])}, one for each sample, "
            f"got {condition.dtype} of shape {tuple(condition.shape)}"
        )
    if torch.compiler.is_compiling():  # a compiled or exported graph cannot look at values
        return
    if condition.device.type == "cuda":
        # Not waited for: wrong labels end the process, in these words. MongeMap looks at those of a batch before.
        inside = ((condition >= 0) & (condition < conditions)).all()
        torch._assert_async(inside, f"condition has a label of none of {_known(conditions)}")
    else:
        check_labels(condition, conditions)


def check_labels(condition: Tensor, conditions: int) -> None:
    """Raise ``ValueError`` unless labels are those of a map; the device is waited for, once.

    Args:
        condition: Integer labels.
        conditions: Number of categories.
    """
    if condition.numel():
        low, high = torch.stack(condition.aminmax()).tolist()
        if low < 0 or high >= conditions:
            raise ValueError(
                f"condition has the label {low if low < 0 else high}, but the map knows {_known(conditions)}"
            )


def _known(conditions: int) -> str:
    return f"{conditions} conditions, 0 to {conditions - 1}"


class ConditionalPerceptron(nn.Module):
    """A multi-layer perceptron whose hidden layers are modulated by a condition; its output starts at zero.

    Args:
        dim: Width of input and output.
        hidden: Widths of the hidden layers.
        activation: Makes the activation between layers.
        conditioning: The modulation of these widths.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int], activation: Callable[[], nn.Module], conditioning: Conditioning
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear(*sizes) for sizes in zip((dim, *hidden[:-1]), hidden, strict=False))
        self.activations = nn.ModuleList(activation() for _ in hidden)
        self.last = _linear(hidden[-1] if hidden else dim, dim, zero=True)
        self.conditioning = conditioning

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return ``(..., d)`` vectors for ``(..., d)`` samples and their conditions."""
        films, shift = self.conditioning(condition)
        for layer, activation, (scale, offset) in zip(self.layers, self.activations, films, strict=True):
            x = activation(scale * layer(x) + offset)
        out: Tensor = self.last(x) + shift
        return out


class PotentialGradient(nn.Module):
    r"""The gradient :math:`\nabla\varphi(x)` of a scalar perceptron :math:`\varphi`, which starts at zero.

    The backward pass through the layers is written out as a forward pass, so that it works without gradients, in
    inference mode, compiled and exported, and can be differentiated like any network.

    Args:
        dim: Dimension of the samples.
        hidden: Widths of the hidden layers, at least one.
        activation: Name of a smooth activation: ``"gelu"``, ``"silu"``, ``"softplus"`` or ``"tanh"``.
        conditioning: The modulation of these widths, for a potential of sample and condition.

    Raises:
        ValueError: The activation is not smooth, or there is no hidden layer.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int], activation: str | None, conditioning: Conditioning | None = None
    ) -> None:
        super().__init__()
        if activation not in _SMOOTH:
            raise ValueError(
                "the gradient of a potential needs a smooth activation of known slope: choose one of "
                f"{', '.join(_SMOOTH)}, got {activation or 'one of your own'}"
            )
        if not hidden:
            raise ValueError("a potential needs at least one hidden layer, got hidden=(): write hidden=(128, 128)")
        self.activation = activation
        self.layers = nn.ModuleList(_linear(*sizes) for sizes in zip((dim, *hidden[:-1]), hidden, strict=True))
        # The potential's own constant has no gradient.
        self.last = nn.Parameter(torch.zeros(hidden[-1]))
        self.conditioning = conditioning

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return ``(..., d)`` gradients at ``(..., d)`` samples."""
        function, slope_of = _SMOOTH[self.activation]
        films, shift = (None, None) if self.conditioning is None else self.conditioning(condition)
        slopes = []
        for index, layer in enumerate(self.layers):
            u = layer(x)
            if films is not None:
                u = films[index][0] * u + films[index][1]
            slope = slope_of(u)
            slopes.append(slope if films is None else slope * films[index][0])
            # The last layer's value is not needed: its slope is.
            x = function(u) if index + 1 < len(self.layers) else u
        gradient = self.last.expand_as(x)
        for layer, slope in zip(reversed(self.layers), reversed(slopes), strict=True):
            gradient = F.linear(gradient * slope, layer.weight.mT)  # type: ignore[arg-type]
        return gradient if shift is None else gradient + shift


def network(
    dim: int,
    hidden: Sequence[int],
    activation: Activation,
    *,
    potential: bool = False,
    conditions: int | None = None,
    condition_dim: int | None = None,
    embedding_dim: int = 32,
) -> nn.Module:
    """Return a network from samples, and perhaps conditions, to vectors, which starts at zero.

    Args:
        dim: Dimension of the samples and of the vectors.
        hidden: Widths of the hidden layers.
        activation: A name, a class of ``torch.nn``, or a function that makes a module.
        potential: Whether the vectors are the gradient of a scalar network.
        conditions: Number of categories of the condition.
        condition_dim: Dimension of the condition.
        embedding_dim: Width of the condition's embedding.
    """
    widths = check_widths(dim, hidden)
    factory, name = activation_factory(activation)
    conditioning = None
    if conditions is not None or condition_dim is not None:
        conditioning = Conditioning(
            widths, dim, conditions=conditions, condition_dim=condition_dim, embedding_dim=embedding_dim
        )
    if potential:
        return PotentialGradient(dim, widths, name, conditioning)
    if conditioning is not None:
        return ConditionalPerceptron(dim, widths, factory, conditioning)
    return perceptron(dim, widths, dim, factory, zero=True)
