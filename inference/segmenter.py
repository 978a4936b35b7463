"""Segmenter: set_image once, then segment its objects; segment_case does both and merges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.case import Case, ObjectPrompts
from inference.geometry import Triple, Window
from inference.model.refiner import Refiner, RefinerConfig
from inference.prompts import WindowPrompts, refiner_channels
from inference.refinement import (
    BOX_SCALE,
    ObjectLogits,
    bounding_box,
    fine_shape,
    first_window,
    grown_window,
    honour_clicks,
    merge,
    touched_faces,
)
from inference.resampling import resample, to_tensor
from inference.sliding_window import Tile, sliding_window, tile_grid

_BATCH = {"cpu": 8, "cuda": 32}  # windows a forward pass
_TILE = 128  # cells, edge of a window of the second pass
_FINE_CELLS = 4 * 128**3  # of one object's second pass at most
_FINE_CELLS_PER_CASE = 100 * 128**3  # of all objects together, the challenge's time limit in view
_GROWTHS_WITH_BOX = 2
_GROWTHS_WITHOUT_BOX = 6


@dataclass
class _Look:
    """One object while its window is still being chosen."""

    prompts: ObjectPrompts
    window: Window
    previous: tuple[Triple, Triple] | None
    growths: int = 0
    resized: bool = False
    logits: Tensor | None = None  # (D, H, W) in the window's grid
    mask: Tensor | None = field(default=None, repr=False)  # what the next look starts from


class Segmenter:
    """Prompted segmentation of one image at a time.

    Args:
        refiner: trained network in evaluation mode, on ``device``.
        device: where to compute.
    """

    def __init__(self, refiner: Refiner, device: torch.device) -> None:
        """Take a network; no image is set."""
        self.device = device
        self._refiner = refiner.to(device).eval()
        self._image: NDArray[np.generic] | None = None
        self._spacing_mm = (1.0, 1.0, 1.0)

    def set_image(self, image: NDArray[np.generic], spacing_mm: tuple[float, float, float]) -> None:
        """Take the (D, H, W) image, any real dtype, that the next objects lie in."""
        self._image, self._spacing_mm = image, spacing_mm

    def segment_case(self, case: Case) -> NDArray[np.uint8]:
        """Segment all objects of a case.

        Returns:
            (D, H, W) label map; each voxel belongs to the object of the highest logit above zero.
            Every click has its way: a positive one's voxel carries its label, a negative one's
            does not (of two clicks on one voxel the newer counts).
        """
        self.set_image(case.image, case.spacing_mm)
        shape = (case.image.shape[0], case.image.shape[1], case.image.shape[2])
        return merge(self.segment(case.objects, case.previous), shape)

    def segment(
        self, objects: Sequence[ObjectPrompts], previous: NDArray[np.uint8] | None = None
    ) -> Iterator[ObjectLogits]:
        """Segment objects of the image, each by itself.

        Args:
            objects: what is known of each; empty ones are left out.
            previous: (D, H, W) label map of the last round, or None.

        Yields:
            Each object's logits, in the order given.

        Raises:
            ValueError: if no image is set.
        """
        if self._image is None:
            raise ValueError("no image is set; call set_image first")
        batch = _BATCH[self.device.type]
        wanted = [o for o in objects if not o.is_empty]
        cells = min(_FINE_CELLS, _FINE_CELLS_PER_CASE // max(1, len(wanted)))
        for i in range(0, len(wanted), batch):
            looks = [self._begin(prompts, previous) for prompts in wanted[i : i + batch]]
            self._look(looks, previous)
            for look in looks:
                yield self._finish(look, previous, cells)

    def _begin(self, prompts: ObjectPrompts, previous: NDArray[np.uint8] | None) -> _Look:
        assert self._image is not None
        before = bounding_box(previous == prompts.label) if previous is not None else None
        edge = self._refiner.config.window
        shape = (edge, edge, edge)
        volume = self._volume
        window = first_window(prompts, before, volume, self._spacing_mm, shape)
        return _Look(prompts, window, before)

    @property
    def _volume(self) -> Triple:
        assert self._image is not None
        D, H, W = self._image.shape
        return D, H, W

    def _look(self, looks: Sequence[_Look], previous: NDArray[np.uint8] | None) -> None:
        """Run the network on the looks' windows, growing and shrinking them until they fit."""
        pending = list(looks)
        while pending:
            logits = self._run([look.window for look in pending], pending, previous)
            again = []
            for look, values in zip(pending, logits, strict=True):
                look.logits = values
                if self._rewindow(look):
                    again.append(look)
            pending = again

    def _rewindow(self, look: _Look) -> bool:
        """Choose a better window where the prediction does not suit this one."""
        assert look.logits is not None
        mask = (look.logits > 0).cpu().numpy()
        boxed = look.prompts.box is not None
        faces = touched_faces(mask, look.window, self._volume)
        limit = _GROWTHS_WITH_BOX if boxed else _GROWTHS_WITHOUT_BOX
        if any(a or b for a, b in faces) and look.growths < limit and not look.resized:
            look.growths += 1
            look.window = grown_window(look.window, faces, self._volume)
            return True
        if boxed or look.resized:
            return False
        # Without a box the object's own size is known only now: look once more, closer.
        look.resized = True
        box = bounding_box(mask)
        if box is None:
            return False
        low = look.window.to_volume([a - 0.5 for a in box[0]])
        high = look.window.to_volume([b - 0.5 for b in box[1]])
        found = (
            tuple(int(np.floor(v + 0.5)) for v in low),
            tuple(int(np.ceil(v + 0.5)) for v in high),
        )
        closer = first_window(
            look.prompts,
            (found[0][:3], found[1][:3]),
            self._volume,
            self._spacing_mm,
            look.window.shape,  # type: ignore[arg-type]
        )
        if all(0.8 < a / b < 1.25 for a, b in zip(closer.size, look.window.size, strict=True)):
            return False
        look.window = closer
        return True

    def _run(
        self,
        windows: Sequence[Window],
        looks: Sequence[_Look],
        previous: NDArray[np.uint8] | None,
    ) -> Tensor:
        """Logits (B, D, H, W) of the looks in windows of equal shape."""
        images = torch.cat([self._cells(window) for window in windows])
        masks, known = [], []
        for window, look in zip(windows, looks, strict=True):
            mask = self._previous_cells(window, look, previous)
            known.append(mask is not None)
            masks.append(torch.zeros_like(images[:1]) if mask is None else mask)
        prompts = [window_prompts(look.prompts, w) for look, w in zip(looks, windows, strict=True)]
        return self._network(refiner_channels(images, prompts, torch.cat(masks), known))

    def _network(self, channels: Tensor) -> Tensor:
        """(B, 9, D, H, W) -> (B, D, H, W) float32 logits."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16):
            logits: Tensor = self._refiner(channels)
        return logits[:, 0]

    def _cells(self, window: Window) -> Tensor:
        """The image in a window's grid, (1, D, H, W)."""
        assert self._image is not None
        return resample(to_tensor(window.crop(self._image, edge=True), self.device), window.shape)

    def _previous_cells(
        self, window: Window, look: _Look, previous: NDArray[np.uint8] | None
    ) -> Tensor | None:
        """The object's previous mask in a window's grid, (1, D, H, W) 0/1, or None."""
        if previous is None or look.previous is None:
            return None
        voxels = (window.crop(previous) == look.prompts.label).astype(np.uint8)
        mask = resample(to_tensor(voxels, self.device), window.shape) > 0.5
        return mask.float() if bool(mask.any()) else None

    def _finish(self, look: _Look, previous: NDArray[np.uint8] | None, cells: int) -> ObjectLogits:
        """Second pass where the grid is coarser than the volume, then voxels."""
        assert look.logits is not None
        window, logits = look.window, look.logits
        if max(window.cell) > 1.25:
            shape = fine_shape(window, cells, self._refiner.config.stride)
            if np.prod(shape) > 1.5 * np.prod(window.shape):
                window, logits = self._second_pass(look, shape)
        return honour_clicks(
            to_voxels(logits, window, look.prompts.label, self._volume), look.prompts.clicks
        )

    def _second_pass(self, look: _Look, shape: Triple) -> tuple[Window, Tensor]:
        """Look at the boundary again, at a finer grid of ``shape`` cells over the same window."""
        assert look.logits is not None
        fine = Window(look.window.start, look.window.stop, shape)
        coarse = resample(look.logits[None], shape)[0]
        image = self._cells(fine)[0]
        mask = (coarse > 0).float()
        prompts = window_prompts(look.prompts, fine)
        tile = tuple(min(_TILE, n) for n in shape)
        tiles = [
            place
            for place in tile_grid(shape, (tile[0], tile[1], tile[2]))
            if 0 < float(mask[place].mean()) < 1
        ]

        def predict(places: Sequence[Tile]) -> Tensor:
            channels = refiner_channels(
                torch.stack([image[p] for p in places]),
                [_shifted(prompts, p) for p in places],
                torch.stack([mask[p] for p in places]),
                [True] * len(places),
            )
            return self._network(channels)

        return fine, sliding_window(shape, tiles, predict, coarse)

    @classmethod
    def from_files(
        cls,
        weights: Path | None = None,
        sam: Path | None = None,
        refiner: bool = True,
        device: str = "auto",
    ) -> Segmenter:
        """Load the networks."""
        chosen = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        state = torch.load(weights, weights_only=True, map_location="cpu")  # type: ignore[arg-type]
        network = Refiner(RefinerConfig.from_dict(state["refiner"]))
        network.load_state_dict(state["average"])
        return cls(network, chosen)


def window_prompts(prompts: ObjectPrompts, window: Window) -> WindowPrompts:
    """An object's prompts in the grid of a window."""
    clicks = tuple((window.to_grid(c.position), c.positive) for c in prompts.clicks)
    box = prompts.box
    if box is None:
        return WindowPrompts(clicks=clicks)
    low = window.to_grid([a - 0.5 for a in box.start])
    high = window.to_grid([b - 0.5 for b in box.stop])
    return WindowPrompts((low, high), window.to_grid((box.middle, 0, 0))[0], clicks)


def _shifted(prompts: WindowPrompts, tile: Tile) -> WindowPrompts:
    """Prompts of a grid in the coordinates of one of its tiles."""
    z0, y0, x0 = (place.start for place in tile)
    clicks = tuple(((z - z0, y - y0, x - x0), positive) for (z, y, x), positive in prompts.clicks)
    if prompts.box is None:
        return WindowPrompts(clicks=clicks)
    low, high = ((z - z0, y - y0, x - x0) for z, y, x in prompts.box)
    return WindowPrompts((low, high), prompts.middle - z0, clicks)


def to_voxels(logits: Tensor, window: Window, label: int, volume: Triple) -> ObjectLogits:
    """Logits of a window's grid at the voxels of the volume, cut to where they may be positive."""
    box = bounding_box((logits > 0).cpu().numpy())
    if box is None:
        return ObjectLogits(label, (0, 0, 0), np.zeros((0, 0, 0), np.float32))
    keep, start = [], []
    for a, b, cell, w, s, n in zip(
        box[0], box[1], window.cell, window.start, window.size, volume, strict=True
    ):
        # One cell around, since interpolation spreads that far; then only what the volume has.
        low = max(int((a - 1) * cell) - 1, -w, 0)
        high = min(int(np.ceil((b + 1) * cell)) + 1, n - w, s)
        keep.append(slice(low, max(low, high)))
        start.append(w + low)
    place = (keep[0], keep[1], keep[2])
    voxels = resample(logits[None], window.size, place)[0].cpu().numpy()
    return ObjectLogits(label, (start[0], start[1], start[2]), voxels)
