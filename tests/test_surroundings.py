"""What an object's window shows of label maps and of clicks on other objects."""

from __future__ import annotations

import numpy as np
import torch

from inference.case import Click, ObjectPrompts
from inference.geometry import Window
from inference.surroundings import Surroundings

CPU = torch.device("cpu")
WINDOW = Window((2, 2, 2), (10, 10, 10), (8, 8, 8))


def _labels() -> np.ndarray:
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[3:6, 3:6, 3:6], labels[3:6, 3:6, 6:9], labels[8:11, 8:11, 8:11] = 1, 2, 3
    return labels


def _objects() -> list[ObjectPrompts]:
    clicks = {1: Click((4, 4, 4), True), 2: Click((4, 4, 7), True), 3: Click((0, 0, 0), False)}
    return [ObjectPrompts(label, None, (click,)) for label, click in clicks.items()]


def test_an_objects_own_mask_and_the_others() -> None:
    labels = _labels()
    around = Surroundings(_objects(), labels, CPU)
    part = labels[2:10, 2:10, 2:10]
    own, others = around.mask(WINDOW, 1), around.others(WINDOW, 1)
    assert own is not None and np.array_equal(own[0].numpy(), part == 1)
    assert np.array_equal(others[0].numpy(), (part == 2) | (part == 3))
    assert around.box(2) == ((3, 3, 6), (6, 6, 9))


def test_an_object_that_is_not_there_has_neither_mask_nor_box() -> None:
    around = Surroundings(_objects(), _labels(), CPU)
    assert around.mask(WINDOW, 4) is None and around.box(4) is None
    far = Window((9, 0, 0), (12, 3, 3), (8, 8, 8))
    assert around.mask(far, 1) is None, "out of sight"


def test_nothing_known_is_nothing_shown() -> None:
    around = Surroundings(_objects(), None, CPU)
    assert around.mask(WINDOW, 1) is None and around.box(1) is None
    assert not around.others(WINDOW, 1).any()


def test_only_positive_clicks_on_other_objects_count() -> None:
    around = Surroundings(_objects(), None, CPU)
    assert around.elsewhere(1) == [(4, 4, 7)]
    assert around.elsewhere(3) == [(4, 4, 4), (4, 4, 7)]
