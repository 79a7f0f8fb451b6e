"""F1, the fully connected network of Hoffer, Hubara, Soudry 2017, for the demo and for the paper's own tables."""

from torch import nn

__all__ = ["F1"]


class F1(nn.Sequential):
    """Five fully connected layers, each with a normalization and ReLU, then a classifier of ten.

    The paper's normalization is ``"batch"``; under ``"layer"`` samples do not interact.
    """

    def __init__(self, normalization: str = "batch", width: int = 512) -> None:
        if normalization not in ("batch", "layer"):
            raise ValueError(f"normalization={normalization!r} must be 'batch' or 'layer'.")
        norm = nn.BatchNorm1d if normalization == "batch" else nn.LayerNorm
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs in (784, width, width, width, width):
            layers += [nn.Linear(inputs, width), norm(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(width, 10))
