"""Segmenter: set_image once, then segment its objects; segment_case does both and merges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.appearance import with_intensity_evidence
from inference.case import Box, Case, ObjectPrompts
from inference.consensus import FLOOR, consensus
from inference.geometry import Triple, Window
from inference.look import BLURRING_CELL, Look
from inference.memory import (
    in_parts,
    is_out_of_memory,
    keep_freed_memory,
    release_memory,
    windows_at_once,
)
from inference.model.refiner import Refiner, load_refiners
from inference.model.sam_med3d import load_sam_med3d
from inference.model.weights import find_weights, read_metadata
from inference.precision import autocast, choose_device, placed
from inference.prompts import refiner_channels, shifted
from inference.refinement import (
    BOX_ALONE,
    FIRST_LOOKS,
    ObjectLogits,
    bounding_boxes,
    first_windows,
    honour_clicks,
    last_mask,
    merge,
    to_voxels,
)
from inference.resampling import transfer, window_cells
from inference.sam_stage import SamStage
from inference.second_pass import FIRST_PASS, boundary_tiles, second_window, tile_edge
from inference.sliding_window import Tile, sliding_window

Finish = Callable[[Iterable[ObjectLogits], Case], NDArray[np.uint8]]

#: How much more a closer look counts than the one it was chosen from (fitted on training cases).
_CLOSER_COUNTS = 2.0
_EDGE = 64  # cells of a region of interest where no refiner says otherwise
#: Clicks from which on the last mask of an object without a box is about as large as the object,
#: so that a box about it may stand for the user's (fitted on training cases).
_SIZE_KNOWN = 4
_TILES = 4  # of one object's second pass at most
_TILES_PER_CASE = 100  # or one of each object; the challenge's time limit in view


class Segmenter:
    """Prompted segmentation of one image at a time.

    Args:
        refiner: trained network in evaluation mode, or None for SAM-Med3D alone.
        sam: SAM-Med3D in its windows, or None for the refiner alone.
        device: where to compute.
        unboxed: another refiner for objects without a box, or None for the same.

    Attributes:
        device: where the next case is computed.
        used_device: where the last one was: the CPU, if the device had too little memory for it.

    Raises:
        ValueError: without any network.
    """

    def __init__(
        self,
        refiner: Refiner | None,
        sam: SamStage | None = None,
        device: torch.device | str = "cpu",
        unboxed: Refiner | None = None,
    ) -> None:
        """Take the networks; no image is set."""
        if refiner is None and sam is None:
            raise ValueError("neither a refiner nor SAM-Med3D given; accepted: one or both")
        self.device = self.used_device = torch.device(device)
        self._refiner = None if refiner is None else placed(refiner, self.device)
        self._unboxed = self._refiner if unboxed is None else placed(unboxed, self.device)
        self._sam = sam
        self._image: NDArray[np.generic] | None = None
        self._spacing_mm = (1.0, 1.0, 1.0)

    def set_image(self, image: NDArray[np.generic], spacing_mm: tuple[float, float, float]) -> None:
        """Take the (D, H, W) image, any real dtype, that the next objects lie in."""
        self._image, self._spacing_mm = image, spacing_mm

    def segment_case(self, case: Case, finish: Finish | None = None) -> NDArray[np.uint8]:
        """Segment all objects of a case.

        Args:
            case: image and prompts.
            finish: makes the label map of the objects' logits (:mod:`inference.finishing`); called
                anew where a GPU's memory ran out and the case is computed on the CPU.

        Returns:
            (D, H, W) label map. By default each voxel belongs to the object of the highest logit
            above zero and every click has its way (:func:`honour_clicks`).
        """
        self.set_image(case.image, case.spacing_mm)
        self.used_device = self.device
        try:
            return self._finished(case, finish)
        except RuntimeError as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
        # Out here the exception is gone, and with it the tensors its traceback held.
        self._move(torch.device("cpu"))
        release_memory()
        try:
            return self._finished(case, finish)
        finally:
            self._return(self.used_device)
            self.used_device = torch.device("cpu")

    def _finished(self, case: Case, finish: Finish | None) -> NDArray[np.uint8]:
        results = self.segment(case.objects, case.previous)
        if self._refiners:  # of SAM-Med3D alone nothing is known that would be worth adding
            results = with_intensity_evidence(results, case)
        return merge(results, self._volume) if finish is None else finish(results, case)

    def _move(self, device: torch.device) -> None:
        self.device = device
        for refiner in self._refiners:
            refiner.to(device)
        if self._sam is not None:
            self._sam.to(device)

    def _return(self, device: torch.device) -> None:
        """Move back to the GPU; stay on the CPU where others have taken its memory meanwhile."""
        try:
            self._move(device)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._move(torch.device("cpu"))
        release_memory()  # what was moved before it ran out

    def segment(
        self, objects: Sequence[ObjectPrompts], previous: NDArray[np.uint8] | None = None
    ) -> Iterator[ObjectLogits]:
        """Segment objects of the image, each by itself but for the clicks on and boxes of others.

        Args:
            objects: what is known of each.
            previous: (D, H, W) label map of the last round, or None.

        Yields:
            Each object's logits, in the order given. One that nothing is said about keeps its
            last mask; without any it is left out.

        Raises:
            ValueError: if no image is set.
        """
        if self._image is None:
            raise ValueError("no image is set; call set_image first")
        cells = max((refiner.config.window**3 for refiner in self._refiners), default=1)
        batch = windows_at_once(self.device, cells)
        known = {} if previous is None else bounding_boxes(previous)
        wanted = [o for o in objects if not o.is_empty or o.label in known]
        tiles = min(_TILES, _TILES_PER_CASE // max(1, sum(not o.is_empty for o in wanted)))
        if any(o.box is None and o.label not in known for o in wanted):
            batch = max(1, batch // len(FIRST_LOOKS))
        clicks = [(o.label, c.position) for o in wanted for c in o.clicks if c.positive]
        boxes = [(o.label, o.box) for o in wanted if o.box is not None]
        for i in range(0, len(wanted), batch):
            some = wanted[i : i + batch]
            parts = {
                o.label: self._begin(o, previous, known.get(o.label), clicks, boxes)
                for o in some
                if not o.is_empty
            }
            for refiner in self._refiners:
                looks = [look for part in parts.values() for look in part]
                self._look(refiner, [k for k in looks if self._asks(k.prompts) is refiner])
            for o in some:
                if o.label in parts:
                    yield self._combine(parts[o.label], tiles)
                elif previous is not None:
                    yield last_mask(previous, o.label, known[o.label])

    def _begin(
        self,
        prompts: ObjectPrompts,
        previous: NDArray[np.uint8] | None,
        before: tuple[Triple, Triple] | None,
        clicks: Sequence[tuple[int, Triple]],
        boxes: Sequence[tuple[int, Box]],
    ) -> list[Look]:
        """Choose an object's first windows and, where there is SAM-Med3D, ask it in one of them."""
        refiner = self._asks(prompts)
        edge = _EDGE if refiner is None else refiner.config.window
        shape = edge, edge, edge
        windows = first_windows(prompts, before, self._volume, self._spacing_mm, shape)
        elsewhere = [place for label, place in clicks if label != prompts.label]
        others = [box for label, box in boxes if label != prompts.label]
        looks = [Look(prompts, w, before, elsewhere, others, previous) for w in windows]
        if self._sam is not None:
            # A background click far away may stretch the refiner's window, no more than that.
            known = replace(prompts, clicks=tuple(c for c in prompts.clicks if c.positive))
            known = prompts if known.is_empty and before is None else known
            region, *_ = first_windows(known, before, self._volume, self._spacing_mm, shape)
            window = self._sam.window(region, self._spacing_mm)
            mask = looks[0].mask_in(window, self.device)
            logits = self._sam.logits(self._cells(window), window, prompts, mask)
            if refiner is None:
                return [Look(prompts, window, before, logits=logits)]
            for look in looks:
                look.sam = window, logits
        return looks

    def _asks(self, prompts: ObjectPrompts) -> Refiner | None:
        """The refiner for an object."""
        return self._refiner if prompts.box is not None else self._unboxed

    @property
    def _refiners(self) -> list[Refiner]:
        """Those there are, each once."""
        return [one for one in dict.fromkeys((self._refiner, self._unboxed)) if one is not None]

    @property
    def _volume(self) -> Triple:
        assert self._image is not None
        D, H, W = self._image.shape
        return D, H, W

    def _look(self, refiner: Refiner, looks: Sequence[Look]) -> None:
        """Run the network on the looks' windows, growing and shrinking them until they fit."""
        pending = list(looks)
        while pending:
            logits = in_parts(lambda some: self._run(refiner, some), pending)
            again = []
            for look, values in zip(pending, logits, strict=True):
                look.logits = values
                if look.rewindow(self._volume, self._spacing_mm):
                    again.append(look)
            pending = again

    def _run(self, refiner: Refiner, looks: Sequence[Look]) -> Tensor:
        """Logits (B, D, H, W) of the looks in their windows.

        Once the last mask tells an object's size, the refiner of objects with a box is asked, too.
        """
        logits = self._logits(refiner, looks)
        if self._refiner is None or refiner is self._refiner:
            return logits
        known = [k.previous is not None and len(k.prompts.clicks) >= _SIZE_KNOWN for k in looks]
        if not any(known):
            return logits
        boxed = [look.boxed() for look, sized in zip(looks, known, strict=True) if sized]
        others = iter(self._logits(self._refiner, boxed))
        return torch.stack(
            [
                (one + next(others)) / 2 if sized else one
                for one, sized in zip(logits, known, strict=True)
            ]
        )

    def _logits(self, refiner: Refiner, looks: Sequence[Look]) -> Tensor:
        """Logits (B, D, H, W) of one refiner."""
        images = torch.cat([self._cells(look.window) for look in looks])
        masks, known = torch.zeros_like(images), []
        for i, look in enumerate(looks):
            mask = look.mask_in(look.window, self.device)
            if mask is None and look.sam is not None:
                source, logits = look.sam
                seen = transfer(logits[None], source, look.window, fill=-6.0) > 0
                mask = seen * self._inside(look.window) if bool(seen.any()) else None
            known.append(mask is not None)
            if mask is not None:
                masks[i] = mask[0]
        prompts = [look.prompts_in(look.window) for look in looks]
        channels = refiner_channels(images, prompts, masks, known)
        return self._network(refiner, channels)

    def _network(self, refiner: Refiner, channels: Tensor) -> Tensor:
        """(B, 11, D, H, W) -> (B, D, H, W) float32 logits."""
        with torch.inference_mode(), autocast(self.device):
            logits: Tensor = refiner(channels)
        return logits[:, 0]

    def _cells(self, window: Window) -> Tensor:
        """The image in a window's grid, (1, D, H, W)."""
        assert self._image is not None
        return window_cells(self._image, window, self.device, edge=True)

    def _inside(self, window: Window) -> Tensor:
        """(D, H, W), 1 in a window's cells inside the volume, 0 beyond it."""
        cells = torch.zeros(window.shape, device=self.device)
        cells[window.inside(self._volume)] = 1
        return cells

    def _combine(self, looks: Sequence[Look], tiles: int) -> ObjectLogits:
        """One object out of its looks."""
        if len(looks) == 1:
            result = self._voxels(looks[0], tiles)
        else:
            share = max(1, tiles // len(looks))
            seen = [self._voxels(look, share, FLOOR) for look in looks]
            for window, logits in [look.wider for look in looks if look.wider is not None]:
                seen.append(to_voxels(logits, window, seen[0].label, self._volume, FLOOR))
            weights = [_CLOSER_COUNTS] * len(looks) + [1.0] * (len(seen) - len(looks))
            result = consensus(seen, weights)
        return honour_clicks(result, looks[0].prompts.clicks)

    def _voxels(self, look: Look, tiles: int, floor: float = 0.0) -> ObjectLogits:
        """Second pass where it is worth its time, then voxels."""
        assert look.logits is not None
        window, logits = look.window, look.logits
        refiner = self._asks(look.prompts)
        if refiner is not None:
            found = (logits > 0) & (self._inside(window) > 0)
            closer = second_window(
                window, found, look.prompts, self._spacing_mm, tiles, refiner.config.stride
            )
            if closer is not None:
                window, logits = closer, self._second_pass(refiner, look, closer)
            logits = look.held(logits, window, self._spacing_mm)
            if look.has_box_alone:
                logits = logits + BOX_ALONE
        return to_voxels(logits, window, look.prompts.label, self._volume, floor)

    def _second_pass(self, refiner: Refiner, look: Look, fine: Window) -> Tensor:
        """Look at the boundary again, in a finer grid over a part of the window.

        Returns:
            (D, H, W) the mean of both passes' logits.
        """
        assert look.logits is not None
        first = transfer(look.logits[None], look.window, fine, fill=-6.0)[0]
        image = self._cells(fine)[0]
        inside = self._inside(fine)
        mask = (first > 0) * inside
        if max(look.window.cell) > BLURRING_CELL:
            mask = look.as_fine_as_before(fine, mask)
        prompts = look.prompts_in(fine)

        def predict(places: Sequence[Tile]) -> Tensor:
            channels = refiner_channels(
                torch.stack([image[p] for p in places]),
                [shifted(prompts, p) for p in places],
                torch.stack([mask[p] for p in places]),
                [True] * len(places),
                torch.stack([first[p] for p in places]) if refiner.config.coarse else None,
            )
            return self._network(refiner, channels)

        edge = tile_edge(refiner.config.stride)
        at_once = 1 if self.device.type == "cpu" else windows_at_once(self.device, edge**3)
        tiles = boundary_tiles(mask, inside, edge)
        second = sliding_window(tiles, lambda some: in_parts(predict, some), first, at_once)
        return second.lerp_(first, FIRST_PASS)

    @classmethod
    def from_files(
        cls,
        weights: Path | None = None,
        sam: Path | None = None,
        refiner: bool = True,
        device: str = "auto",
    ) -> Segmenter:
        """Load the networks.

        Args:
            weights: our bundle; by default the one in the weights folder.
            sam: a SAM-Med3D checkpoint; it goes before the bundle's own.
            refiner: False for SAM-Med3D alone.
            device: ``auto`` (CUDA where there is one that computes), ``cpu`` or ``cuda``.

        Raises:
            ValueError: a file is not what it should be, or no SAM-Med3D is there to be alone.
            FileNotFoundError: there are no default weights.
        """
        place = choose_device(device)
        if place.type == "cpu":
            keep_freed_memory()
        bundle = weights if weights or (sam and not refiner) else find_weights()
        network = unboxed = stage = None
        if refiner and bundle is not None:
            network, unboxed = load_refiners(bundle)
        if sam is None and bundle is not None and "sam" in read_metadata(bundle):
            sam = bundle
        if sam is not None:
            stage = SamStage(load_sam_med3d(sam), place)
        elif not refiner:
            raise ValueError(
                f"refiner off, but {bundle} holds no SAM-Med3D; accepted: a bundle with one, or a "
                "SAM-Med3D checkpoint beside it"
            )
        return cls(network, stage, place, unboxed)
