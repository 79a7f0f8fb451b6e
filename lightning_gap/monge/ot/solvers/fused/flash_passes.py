"""Soft minima of squared distances on a GPU by FlashSinkhorn's kernel, in the place of ours."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_gap.extras import library
from lightning_gap.monge.ot.solvers.fused.triton_passes import TritonPasses

__all__ = ["FLASH_COORDINATES", "FLASH_PLACES", "FlashPasses", "require_flash"]

# Its kernel places coordinates by 32-bit numbers.
FLASH_PLACES = 1 << 31
# It says of itself that Triton gives wrong products where a block of coordinates, 16 at least, holds all of them.
FLASH_COORDINATES = 32


class FlashPasses(TritonPasses):
    r"""Passes whose soft minima are FlashSinkhorn's, and gradients ours; samples are in float32 on CUDA.

    With centered points and potentials in units of epsilon, as all of ours are, its kernel's epsilon is 1 and its
    scale of :math:`|x - y|^2` our :math:`w / \varepsilon`. It is kept from TensorFloat-32, and from tuning itself by
    the clock, which would let two runs round otherwise.

    Ye et al. 2026, "FlashSinkhorn" (arXiv:2602.03067).
    """

    def _keep(self, rows: Tensor, columns: Tensor) -> None:
        super()._keep(rows, columns)
        missing = max(0, FLASH_COORDINATES - self._d)
        self._points = tuple(
            pad((self._images(points) - self.middle).to(torch.float32), (0, missing)).contiguous()
            for points in (self.x, self.y)
        )
        # Of the rounded points, whose products the kernel takes.
        self._norms = tuple(self.scale * points.double().square().sum(1) for points in self._points)

    def _soft_minimum(self, G: Tensor, b: Tensor, share: float) -> Tensor:
        offsets = G + b.log() - self._norms[1]
        top = offsets.amax()
        bias = self._filled(offsets - top, len(offsets)).to(torch.float32)
        kernel = require_flash().flashsinkhorn_lse
        found: Tensor = kernel(*self._points, bias, 1.0, cost_scale=self.scale, allow_tf32=False, autotune=False)
        return (found.to(G.dtype) + self._norms[0] - top).mul_(share)


def require_flash() -> Any:
    """Return FlashSinkhorn's module of kernels; raise what says how to install it."""
    return library("flash_sinkhorn.kernels.sinkhorn_flashstyle_sqeuclid", "solver='flash'", "flash")
