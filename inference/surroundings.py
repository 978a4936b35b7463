"""What an object's window shows of label maps and of clicks on other objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.case import ObjectPrompts
from inference.geometry import Triple, Window
from inference.refinement import bounding_boxes
from inference.resampling import resample, to_tensor


class Surroundings:
    """The masks that all objects have so far, and where users clicked on each.

    Args:
        objects: all of the case.
        previous: (D, H, W) label map of the last round, or None.
        device: where windows are made.
    """

    def __init__(
        self,
        objects: Sequence[ObjectPrompts],
        previous: NDArray[np.uint8] | None,
        device: torch.device,
    ) -> None:
        """Measure the objects of the last round."""
        self._previous, self._device = previous, device
        self._boxes = {} if previous is None else bounding_boxes(previous)
        self._clicks = [(o.label, c.position) for o in objects for c in o.clicks if c.positive]

    def box(self, label: int) -> tuple[Triple, Triple] | None:
        """Bounding box of an object's mask of the last round, or None where it has none."""
        return self._boxes.get(label)

    def mask(self, window: Window, label: int) -> Tensor | None:
        """An object's mask of the last round in a window's grid, (1, D, H, W) 0/1, or None."""
        if self._previous is None or label not in self._boxes:
            return None
        mask = self._share(window.crop(self._previous) == label, window.shape) > 0.5
        return mask.float() if bool(mask.any()) else None

    def others(self, window: Window, label: int) -> Tensor:
        """The other objects' share of each cell of a window's grid, (1, D, H, W) 0..1."""
        if self._previous is None:
            return torch.zeros((1, *window.shape), device=self._device)
        labels = np.asarray(window.crop(self._previous), np.uint8)
        return self._share((labels != label) & (labels > 0), window.shape)

    def elsewhere(self, label: int) -> list[Triple]:
        """Voxels where users clicked on other objects."""
        return [position for other, position in self._clicks if other != label]

    def _share(self, voxels: NDArray[np.bool_], shape: Triple) -> Tensor:
        return resample(to_tensor(voxels.view(np.uint8), self._device), shape)
