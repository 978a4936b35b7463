"""A look: one object in one window, chosen anew until the prediction suits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.case import Box, ObjectPrompts
from inference.geometry import Triple, Window
from inference.prompts import WindowPrompts, bump, summed, window_prompts
from inference.refinement import (
    bounding_box,
    click_voxels,
    first_windows,
    grown_window,
    hull,
    touched_faces,
)
from inference.resampling import covered_cells, transfer, window_cells

#: Voxels: from here on cells lose of thin layers what the last round had found (chosen on training
#: cases).
BLURRING_CELL = 3.0
#: Log-odds by which an object is held to the mask of its last round; sigma of the surroundings of
#: the newest click, where it is not, in mean edges of that mask's box. Both chosen on bent
#: training cases, where half to twice as much does nearly as well.
_HOLD, _FREE = 1.5, 0.3
_GROWTHS_WITH_BOX = 2
_GROWTHS_WITHOUT_BOX = 6


@dataclass
class Look:
    """One object while its window is still being chosen.

    Attributes:
        prompts: of the object.
        window: the current one.
        previous: bounding box of the object's mask of the last round, or None.
        elsewhere: voxels (z, y, x) where users clicked on other objects.
        others: boxes of other objects.
        labels: (D, H, W) label map of the last round, or None.
        growths: how often the window has grown.
        resized: whether it was chosen anew for the size found.
        sam: SAM-Med3D's window and its logits there, or None.
        logits: (D, H, W) in the window's grid, once the network has been asked.
        wider: the window before it was chosen anew for the size found, and its logits, or None.
    """

    prompts: ObjectPrompts
    window: Window
    previous: tuple[Triple, Triple] | None
    elsewhere: Sequence[Triple] = ()
    others: Sequence[Box] = ()
    labels: NDArray[np.uint8] | None = None
    growths: int = 0
    resized: bool = False
    sam: tuple[Window, Tensor] | None = None
    logits: Tensor | None = None
    wider: tuple[Window, Tensor] | None = None

    def prompts_in(self, window: Window) -> WindowPrompts:
        """All that was said, in the grid of a window."""
        return window_prompts(self.prompts, window, self.elsewhere, self.others)

    def mask_in(self, window: Window, device: torch.device | str = "cpu") -> Tensor | None:
        """The object's mask of the last round in a window's grid, (1, D, H, W) 0/1, or None."""
        if self.labels is None or self.previous is None:
            return None
        share = window_cells(self.labels, window, device, label=self.prompts.label)
        mask = covered_cells(share)
        return mask.float() if bool(mask.any()) else None

    def as_fine_as_before(self, fine: Window, mask: Tensor) -> Tensor:
        """What the second pass begins with: the last round's mask where the first changed nothing.

        Long cells lose what is thin, and would do so at every round.

        Args:
            fine: of the second pass, within the first one's window.
            mask: (D, H, W) 0/1, of the first pass in its grid.
        """
        before = self.mask_in(fine, mask.device)
        shown = self.mask_in(self.window, mask.device)
        if before is None or shown is None or self.logits is None:
            return mask
        changed = ((self.logits > 0) != (shown[0] > 0)).float()
        share = transfer(changed[None], self.window, fine, fill=0.0)[0]
        return torch.where(share > 0.5, mask, before[0])

    @property
    def has_box_alone(self) -> bool:
        """Whether a box is all that is known."""
        prompts = self.prompts
        return prompts.box is not None and self.previous is None and not prompts.clicks

    def held(self, logits: Tensor, window: Window, spacing_mm: Sequence[float]) -> Tensor:
        """Logits drawn to the last round's mask, less where the newest click lies.

        A click tells that something is wrong about it; elsewhere a network that is asked anew
        wavers. The more a mask has been told the better it is: of n prompts, the box one of them,
        it knows n - 1, and it holds with (n - 2) / (n - 1).

        Args:
            logits: (D, H, W) in the window's grid.
            window: of the first or of the second pass.
            spacing_mm: (z, y, x).
        """
        clicks = self.prompts.clicks
        told = len(clicks) + (self.prompts.box is not None)
        if told < 3 or self.previous is None:
            return logits
        mask = self.mask_in(window, logits.device)
        if mask is None:
            return logits
        low, high = self.previous
        edges = [(b - a) * mm for a, b, mm in zip(low, high, spacing_mm, strict=True)]
        sigma = _FREE * float(np.prod(edges)) ** (1 / 3)
        grid = zip(
            window.shape,
            window.to_grid(clicks[-1].position),
            window.cell,
            spacing_mm,
            strict=True,
        )
        near = [
            bump(torch.arange(n, device=logits.device), logits.new_tensor([p]), sigma / (cell * mm))
            for n, p, cell, mm in grid
        ]
        share = _HOLD * (told - 2) / (told - 1)
        return logits + share * (2 * mask[0] - 1) * (1 - summed(near))

    def boxed(self) -> Look:
        """The same object shown with the box of its last mask and of what was clicked on since."""
        assert self.previous is not None
        low, high = hull([self.previous, *click_voxels(self.prompts.clicks, positive=True)])
        box = Box(low, high, (low[0] + high[0]) // 2)
        return dataclasses.replace(self, prompts=dataclasses.replace(self.prompts, box=box))

    def rewindow(self, volume: Triple, spacing_mm: tuple[float, float, float]) -> bool:
        """Choose a better window where the prediction does not suit this one.

        Args:
            volume: its size.
            spacing_mm: (z, y, x).

        Returns:
            Whether the window is another one, in which the network has to look again.
        """
        assert self.logits is not None
        # Beyond the volume networks say anything: nothing was asked of them there in training.
        known = self.window.inside(volume)
        mask = np.zeros(self.window.shape, bool)
        mask[known] = (self.logits[known] > 0).cpu().numpy()
        boxed = self.prompts.box is not None
        faces = touched_faces(mask, self.window, volume)
        limit = _GROWTHS_WITH_BOX if boxed else _GROWTHS_WITHOUT_BOX
        if any(a or b for a, b in faces) and self.growths < limit and not self.resized:
            self.growths += 1
            self.window = grown_window(self.window, faces, volume)
            return True
        if boxed or self.resized:
            return False
        # Without a box the object's own size is known only now: look once more, closer.
        self.resized = True
        box = bounding_box(mask)
        if box is None:
            return False
        found = self.window.voxels(*box)
        (closer,) = first_windows(self.prompts, found, volume, spacing_mm, self.window.shape)
        if all(0.8 < a / b < 1.25 for a, b in zip(closer.size, self.window.size, strict=True)):
            return False
        self.wider = self.window, self.logits
        self.window = closer
        return True
