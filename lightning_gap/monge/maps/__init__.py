"""Networks that map samples to samples: torch alone, importable without Lightning."""

from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.maps.brenier import BrenierMap
from lightning_gap.monge.maps.conditional import ConditionalMap

# The function, and not its module of the same name.
from lightning_gap.monge.maps.conservativity import conservativity
from lightning_gap.monge.maps.entropic import EntropicMap
from lightning_gap.monge.maps.mlp import MLP
from lightning_gap.monge.maps.residual import ResidualMLP
from lightning_gap.monge.maps.semidual import semidual
from lightning_gap.monge.maps.sphere import SphereMap
from lightning_gap.monge.maps.starts import StartPair
from lightning_gap.monge.maps.structured import StructuredMap

__all__ = [
    "MLP",
    "BrenierMap",
    "ConditionalMap",
    "EntropicMap",
    "ResidualMLP",
    "SphereMap",
    "StartPair",
    "StructuredMap",
    "TransportMap",
    "conservativity",
    "semidual",
]
