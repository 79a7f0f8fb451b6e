"""Ground costs :math:`c(x, y)`: the public face of :mod:`lightning_gap.monge.ot.costs`."""

from lightning_gap.monge.ot.costs import *  # noqa: F403
from lightning_gap.monge.ot.costs import __all__ as __all__
