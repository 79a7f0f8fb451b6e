"""Single cells: AnnData through a map and back, and distances between populations of them."""

from typing import TYPE_CHECKING

from lightning_gap.faces import lazy

if TYPE_CHECKING:
    from lightning_gap.monge.cells.by_condition import distances_by_condition as distances_by_condition
    from lightning_gap.monge.cells.by_condition import scores_by_condition as scores_by_condition
    from lightning_gap.monge.cells.groups import distances_to as distances_to
    from lightning_gap.monge.cells.groups import pairwise_distances as pairwise_distances
    from lightning_gap.monge.cells.images import pull as pull
    from lightning_gap.monge.cells.images import push as push
    from lightning_gap.monge.cells.images import to_anndata as to_anndata

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
