"""Perceptrons that a condition modulates, and the conditions that they take."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_gap.checks import check_integer
from lightning_gap.monge.maps.perceptron import linear
from lightning_gap.trainer.internals.of_torch import assert_async

__all__ = ["ConditionalPerceptron", "Conditioning", "check_condition", "check_labels"]


class Conditioning(nn.Module):
    """Turns a condition into a scale and a shift for every hidden layer, and a shift of the output.

    Feature-wise linear modulation (Perez et al. 2018, "FiLM"), linear in an embedding: scales start at 1, the output's
    shift at 0.
    """

    def __init__(
        self,
        widths: Sequence[int],
        n_out: int,
        *,
        num_conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int = 32,
    ) -> None:
        super().__init__()
        if (num_conditions is None) == (condition_dim is None):
            raise ValueError(
                "give one of num_conditions=, the number of categories, and condition_dim=, the dimension of vectors, "
                f"got num_conditions={num_conditions!r} and condition_dim={condition_dim!r}"
            )
        check_integer("embedding_dim", embedding_dim)
        self.embedding: nn.Module
        if num_conditions is not None:
            self.embedding = nn.Embedding(check_integer("num_conditions", num_conditions), embedding_dim)
        else:
            p = check_integer("condition_dim", condition_dim)
            self.embedding = nn.Sequential(linear(p, embedding_dim), nn.SiLU())
        self.films = nn.ModuleList(linear(embedding_dim, 2 * width) for width in widths)
        for film, width in zip(self.films, widths, strict=True):
            nn.init.zeros_(film.weight[:width])  # type: ignore[index]
        self.shift = linear(embedding_dim, n_out, zero=True, bias=False)

    def forward(self, condition: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return scales and shifts of the hidden layers, and the shift of the output."""
        embedded = self.embedding(condition)
        films = []
        for film in self.films:
            scale, shift = film(embedded).chunk(2, dim=-1)
            films.append((1 + scale, shift))
        return films, self.shift(embedded)


class ConditionalPerceptron(nn.Module):
    """A multi-layer perceptron whose hidden layers are modulated by a condition; its output starts at zero."""

    def __init__(
        self, dim: int, hidden: Sequence[int], activation: Callable[[], nn.Module], conditioning: Conditioning
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(*sizes) for sizes in zip((dim, *hidden[:-1]), hidden, strict=False))
        self.activations = nn.ModuleList(activation() for _ in hidden)
        self.last = linear(hidden[-1] if hidden else dim, dim, zero=True)
        self.conditioning = conditioning

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return ``(..., d)`` vectors for ``(..., d)`` samples and their conditions."""
        films, shift = self.conditioning(condition)
        for layer, activation, (scale, offset) in zip(self.layers, self.activations, films, strict=True):
            x = activation(scale * layer(x) + offset)
        out: Tensor = self.last(x) + shift
        return out


def check_condition(x: Tensor, condition: Tensor, num_conditions: int | None, condition_dim: int | None) -> None:
    """Raise ``ValueError`` unless there is one condition of the right kind for each sample."""
    if num_conditions is None:
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
        inside = ((condition >= 0) & (condition < num_conditions)).all()
        assert_async(inside, f"condition has a label of none of {_known(num_conditions)}")
    else:
        check_labels(condition, num_conditions)


def check_labels(condition: Tensor, num_conditions: int) -> None:
    """Raise ``ValueError`` unless labels are those of a map; the device is waited for, once."""
    if condition.numel():
        low, high = torch.stack(condition.aminmax()).tolist()
        if low < 0 or high >= num_conditions:
            raise ValueError(
                f"condition has the label {low if low < 0 else high}, but the map knows {_known(num_conditions)}"
            )


def _known(num_conditions: int) -> str:
    return f"{num_conditions} conditions, 0 to {num_conditions - 1}"
