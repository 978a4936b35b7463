"""Which windows the segmenter takes for an object, and what it shows the network there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from inference.case import Box, Case, Click, ObjectPrompts
from inference.geometry import Window
from inference.model.refiner import CHANNELS, Refiner, RefinerConfig
from inference.segmenter import Segmenter

ISOTROPIC = (1.0, 1.0, 1.0)


class Threshold(Segmenter):
    """Calls bright cells the object, so that what a grid resolves is what comes out.

    Keeps the masks that the network is shown.
    """

    def __init__(self) -> None:
        super().__init__(Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)))
        self.masks: list[torch.Tensor] = []

    def _network(self, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        self.masks.append(channels[:, CHANNELS.index("previous_mask")])
        return 100 * channels[:, 0]  # surer than anything the segmenter adds


@pytest.mark.parametrize(("edge", "boxed"), [(16, True), (104, False)])
def test_the_window_grows_until_the_object_fits(edge: int, boxed: bool) -> None:
    """A bar of which a box, or a cube of which the last mask holds the middle alone."""
    truth = np.zeros((edge + 32, edge + 32, 120), np.uint8)
    truth[16:-16, 16:-16, 8:-8] = 1
    middle = edge // 2 + 16
    start, stop = (middle - 8, middle - 8, 52), (middle + 8, middle + 8, 68)
    before = np.zeros_like(truth)
    before[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = 1
    prompts = ObjectPrompts(1, None, (Click((middle, middle, 60), True),))
    if boxed:
        prompts = ObjectPrompts(1, Box(start, stop, middle))
    image = np.where(truth, 200, 30).astype(np.uint8)
    image[::8, ::8] = 30  # or within it there would be nothing to be seen
    case = Case("bar.npz", image, ISOTROPIC, (prompts,), previous=None if boxed else before)
    found = Threshold().segment_case(case)
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.7


def slit_cube() -> tuple[np.ndarray, tuple[slice, ...], Case]:
    """A cube with a slit of two voxels, its place, and the case with the cube's box."""
    truth = np.zeros((96, 96, 96), np.uint8)
    truth[16:80, 16:80, 16:80] = 1
    slit = np.s_[30:66, 30:66, 61:63]
    truth[slit] = 0
    objects = (ObjectPrompts(1, Box((16, 16, 16), (80, 80, 80), 48)),)
    image = np.where(truth, 200, 30).astype(np.uint8)
    return truth, slit, Case("slit.npz", image, ISOTROPIC, objects)


def test_a_large_object_is_looked_at_again_at_the_volumes_resolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slit of two voxels is blurred on the coarse grid of 3.6 voxels a cell, not on the fine."""
    truth, slit, case = slit_cube()
    segmenter = Threshold()
    monkeypatch.setattr("inference.segmenter.FIRST_PASS", 0)
    assert np.array_equal(segmenter.segment_case(case), truth)
    monkeypatch.setattr("inference.second_pass._TILE", 32)
    monkeypatch.setattr("inference.segmenter._TILES", 1)
    assert (segmenter.segment_case(case)[slit] == 0).mean() < 0.8


def test_masks_end_with_the_volume() -> None:
    """Beyond it the image goes on as its edge, so what the network finds there is left out."""
    image = np.full((96, 96, 96), 30, np.uint8)
    image[:64, 16:80, 16:80] = 200
    objects = (ObjectPrompts(1, Box((0, 16, 16), (64, 80, 80), 32)),)
    case = Case("face.npz", image, ISOTROPIC, objects)
    segmenter = Threshold()
    assert np.array_equal(segmenter.segment_case(case), image > 100)
    (first, second) = segmenter.masks
    assert not first.any(), "nothing is known before the first pass"
    middle = second[0, :, second.shape[2] // 2, second.shape[3] // 2]
    beyond = 16  # voxels and cells: the second pass looks at 96 about the box's 64
    assert (middle[: beyond - 1] == -1).all() and (middle[beyond + 1 : 2 * beyond] == 1).all()


def test_thin_layers_of_the_last_mask_are_shown_again() -> None:
    """Cells of 3.6 voxels lose a slit of two; nothing about it has changed, so it stays a slit."""
    truth, slit, case = slit_cube()
    clicked = replace(case.objects[0], clicks=(Click((20, 20, 20), True),))
    segmenter = Threshold()
    segmenter.segment_case(replace(case, objects=(clicked,), previous=truth))
    (_, second) = segmenter.masks
    assert second.shape[1:] == truth.shape  # voxel by voxel
    assert (second[0][slit] == -1).float().mean() > 0.9


@pytest.mark.parametrize(("count", "expected"), [(1, 4), (30, 3), (60, 1), (120, 0)])
def test_all_objects_of_a_case_share_the_tiles_of_the_second_pass(
    monkeypatch: pytest.MonkeyPatch, count: int, expected: int
) -> None:
    """Or a case of many would take longer than the challenge allows."""
    given = set()

    def watch(window: Window, found: torch.Tensor, prompts: object, mm: object, n: int, _: int):
        given.add(n)

    monkeypatch.setattr("inference.segmenter.second_window", watch)
    objects = [ObjectPrompts(k + 1, Box((k % 8, 2, 3), (k % 8 + 4, 6, 7), 5)) for k in range(count)]
    segmenter = Threshold()
    segmenter.set_image(np.full((16, 16, 16), 200, np.uint8), ISOTROPIC)
    assert len(list(segmenter.segment(objects))) == count
    assert given == {expected}
