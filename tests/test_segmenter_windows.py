"""Which windows the segmenter takes for an object, and what it shows the network there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference.case import Box, Case, Click, ObjectPrompts
from inference.geometry import Window
from inference.model.refiner import CHANNELS, Refiner, RefinerConfig
from inference.segmenter import Segmenter

ISOTROPIC = (1.0, 1.0, 1.0)


class Threshold(Segmenter):
    """Calls bright cells the object, and keeps the masks that the network is shown."""

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


def test_thin_layers_of_the_last_mask_are_shown_again() -> None:
    """Cells of 3.6 voxels lose a slit of two; nothing about it has changed, so it stays a slit."""
    truth = np.zeros((96, 96, 96), np.uint8)
    truth[16:80, 16:80, 16:80] = 1
    slit = np.s_[30:66, 30:66, 61:63]
    truth[slit] = 0
    clicks = (Click((20, 20, 20), True),)
    objects = (ObjectPrompts(1, Box((16, 16, 16), (80, 80, 80), 48), clicks),)
    image = np.where(truth, 200, 30).astype(np.uint8)
    segmenter = Threshold()
    segmenter.segment_case(Case("slit.npz", image, ISOTROPIC, objects, previous=truth))
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
