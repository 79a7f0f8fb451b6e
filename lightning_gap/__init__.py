"""Close two gaps with PyTorch Lightning.

* The **generalization gap** of large-batch training (Hoffer, Hubara, Soudry 2017, "Train longer, generalize
  better"): :class:`LargeBatchRegime`, :class:`GhostBatchNorm`, :class:`UltraSlowDiffusion` and
  :class:`GradientNoiseScale` are callbacks for any ``Trainer``.
* The **Monge gap** (Uscidda, Cuturi 2023): :class:`MongeMap` learns an optimal transport map between two sets of
  samples for any cost; :func:`monge_gap` and :func:`sinkhorn_divergence` are the mathematics.

Each name is imported when it is first used, so that ``import lightning_gap`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# One line a public name: where it lives. `__all__` and `__dir__` follow from this table.
_HOME = {
    "GhostBatchNorm": "lightning_gap.ghost",
    "GradientNoiseScale": "lightning_gap.regime",
    "LargeBatchRegime": "lightning_gap.regime",
    "MapFigure": "lightning_gap.monge",
    "MongeMap": "lightning_gap.monge",
    "SamplesDataModule": "lightning_gap.monge",
    "UltraSlowDiffusion": "lightning_gap.diffusion",
    "convert_ghost_batchnorm": "lightning_gap.ghost",
    "effective_batch_size": "lightning_gap.regime",
    "monge_gap": "lightning_gap.monge",
    "recalibrate_batchnorm": "lightning_gap.ghost",
    "revert_ghost_batchnorm": "lightning_gap.ghost",
    "sinkhorn_divergence": "lightning_gap.monge",
}
_MODULES = {"costs": "lightning_gap.monge.costs"}

__all__ = [
    "GhostBatchNorm",
    "GradientNoiseScale",
    "LargeBatchRegime",
    "MapFigure",
    "MongeMap",
    "SamplesDataModule",
    "UltraSlowDiffusion",
    "convert_ghost_batchnorm",
    "costs",
    "effective_batch_size",
    "monge_gap",
    "recalibrate_batchnorm",
    "revert_ghost_batchnorm",
    "sinkhorn_divergence",
]

if TYPE_CHECKING:
    from lightning_gap.diffusion import UltraSlowDiffusion
    from lightning_gap.ghost import (
        GhostBatchNorm,
        convert_ghost_batchnorm,
        recalibrate_batchnorm,
        revert_ghost_batchnorm,
    )
    from lightning_gap.monge import MapFigure, MongeMap, SamplesDataModule, costs, monge_gap, sinkhorn_divergence
    from lightning_gap.regime import GradientNoiseScale, LargeBatchRegime, effective_batch_size


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'lightning_gap' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
