"""The first of two networks: SAM-Med3D in a window about the object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.case import ObjectPrompts
from inference.geometry import Triple, Window
from inference.model.sam_med3d import SamMed3D
from inference.precision import autocast
from inference.refinement import BOX_SCALE
from inference.resampling import resample

#: Of the windows that public checkpoints were trained on.
PUBLIC_SPACING_MM = 1.5
#: An object larger than such a window gets a coarser one, this much larger than it.
PUBLIC_MARGIN = 1.2
#: Hard previous masks stand in for the logits of training.
MASK_LOGIT = 6.0
_NO_POINT = -1  # label of what was a point before


class SamStage:
    """SAM-Med3D with the windows it was trained on: its configuration says which.

    Args:
        model: the network, in evaluation mode.
        device: where to compute.
    """

    def __init__(self, model: SamMed3D, device: torch.device) -> None:
        """Move the network to the device."""
        self._model = model.to(device)
        self._boxes = model.config.windows == "box"
        edge = model.config.image_size
        self.shape: Triple = (edge, edge, edge)
        low = 4 * edge // model.config.patch_size  # masks have 4^3 cells a token
        self._low: Triple = (low, low, low)

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._model.to(device)

    def window(self, region: Window, spacing_mm: tuple[float, float, float]) -> Window:
        """The network's window for an object whose region of interest is ``region``."""
        if self._boxes:
            return Window(region.start, region.stop, self.shape)
        longest = max(n * s for n, s in zip(region.size, spacing_mm, strict=True))
        edge = max(PUBLIC_SPACING_MM * self.shape[0], longest * PUBLIC_MARGIN / BOX_SCALE)
        start, stop = [], []
        for a, b, s in zip(region.start, region.stop, spacing_mm, strict=True):
            n = max(1, round(edge / s))
            start.append(round((a + b - n) / 2))
            stop.append(start[-1] + n)
        return Window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]), self.shape)

    def _shows(self, place: Sequence[float]) -> bool:
        """Whether a place in the grid lies in the window: what is beyond no network has learnt."""
        return all(-0.5 <= p <= n - 0.5 for p, n in zip(place, self.shape, strict=True))

    def logits(
        self, image: Tensor, window: Window, prompts: ObjectPrompts, previous: Tensor | None
    ) -> Tensor:
        """Segment one object in its window.

        Clicks are points, but for background ones outside of the window; a box's centre is a
        positive one while there is no positive click (after that, networks trained on box windows
        get it as no point, as in training). These networks also get the box, which public ones
        never learnt.

        Args:
            image: (1, *shape) raw intensities.
            window: from :meth:`window`.
            prompts: of the object; not empty.
            previous: (1, *shape) mask of the last round, 0..1, or None.

        Returns:
            (*shape) float32 logits.
        """
        clicks = [(window.to_grid(click.position), click.positive) for click in prompts.clicks]
        clicks = [(at, positive) for at, positive in clicks if positive or self._shows(at)]
        places = [at for at, _ in clicks]
        labels = [int(positive) for _, positive in clicks]
        boxes = None
        if prompts.box is not None:
            first = window.to_grid(prompts.box.start)
            last = window.to_grid([b - 1 for b in prompts.box.stop])
            z, y, x = ((a + b) / 2 for a, b in zip(first, last, strict=True))
            if self._boxes:
                boxes = image.new_tensor([[*first, *last]])
            if self._boxes or 1 not in labels:
                places.insert(0, (z, y, x))
                labels.insert(0, _NO_POINT if 1 in labels else 1)
        points = (image.new_tensor([places]), torch.tensor([labels], device=image.device))
        masks = None
        if previous is not None:
            small = resample(previous, self._low)
            masks = (MASK_LOGIT * (2 * small - 1))[None]
        with torch.inference_mode(), autocast(image.device):
            embedding = self._model.encode_image(_normalise(image)[None])
            low, _ = self._model.decode(
                embedding, points if places else None, boxes=boxes, masks=masks
            )
        return resample(low[:, 0].float(), self.shape)[0]


def _normalise(image: Tensor) -> Tensor:
    """Z-scores over the voxels above 0, as SAM-Med3D was trained (over all if there are none)."""
    inside = image[image > 0]
    std, mean = torch.std_mean(inside if inside.numel() > 1 else image, correction=0)
    return (image - mean) / std.clamp_min(1e-6)
