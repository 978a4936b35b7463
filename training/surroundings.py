"""The window in which an object was first looked at, seen from a close look at a part of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.prompts import Point, WindowPrompts, moved
from inference.resampling import covered_cells, interpolate


@dataclass
class Surroundings:
    """A window with parallel axes about a close look at a part of what it shows.

    Attributes:
        image: (D, H, W) float32 intensities of any scale.
        inside: (D, H, W) bool, which cells lie in the volume.
        first: (z, y, x) of the close look's first cell in the cells of this window.
        size: (z, y, x) edges of the close look's cells, in those of this window.
    """

    image: Tensor
    inside: Tensor
    first: Point
    size: Point

    def prompts(self, close: WindowPrompts) -> WindowPrompts:
        """The close look's prompts in the cells of this window."""

        def move(point: Point) -> Point:
            z, y, x = (a + p * s for p, a, s in zip(point, self.first, self.size, strict=True))
            return z, y, x

        return moved(close, move)

    def shown(self, values: Tensor, edge: int) -> Tensor:
        """(D, H, W) values of this window, interpolated at the close look's ``edge``^3 cells."""
        axes = []
        for n, first, size in zip(values.shape, self.first, self.size, strict=True):
            cells = first + size * torch.arange(edge, device=values.device, dtype=torch.float32)
            axes.append((2 * cells + 1) / n - 1)
        return interpolate(values[None], axes)[0]

    def taught(self, mask: Tensor, close: Tensor) -> Tensor:
        """A (D, H, W) bool mask of this window, corrected by the close look's.

        Cells count as the object's by the share that it has of them, as in the next round of
        inference, which sees the voxels of both passes through the first one's grid.
        """
        maps, seen = [], torch.ones_like(mask)
        for axis, n in enumerate(mask.shape):
            fine = torch.arange(close.shape[axis], device=mask.device, dtype=torch.float32)
            cells = torch.arange(n, device=mask.device, dtype=torch.float32)
            cells = ((cells - self.first[axis]) / self.size[axis])[:, None]
            half = 0.5 / self.size[axis]
            overlap = torch.minimum(cells + half, fine + 0.5) - torch.maximum(
                cells - half, fine - 0.5
            )
            overlap = overlap.clamp_min(0)
            maps.append(overlap / overlap.sum(1, keepdim=True).clamp_min(1e-6))
            within = (cells[:, 0] > -0.5) & (cells[:, 0] < close.shape[axis] - 0.5)
            seen &= within.reshape([-1 if a == axis else 1 for a in range(3)])
        share = torch.einsum("dhw,zd,yh,xw->zyx", close.float(), *maps)
        return covered_cells(torch.where(seen, share, mask.float())[None])[0]
