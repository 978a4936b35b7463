"""A look: how its window is chosen anew, and what it makes of the last round's mask."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from inference.case import Box, Click, ObjectPrompts
from inference.geometry import Window
from inference.look import Look
from inference.resampling import resample


def test_what_lies_beyond_the_volume_chooses_no_window() -> None:
    volume, window = (40, 60, 60), Window((-20, 0, 0), (44, 64, 64), (32, 32, 32))
    prompts = ObjectPrompts(1, clicks=(Click((5, 30, 30), True),))
    chosen = []
    for beyond in (-1.0, 1.0):
        logits = torch.full((32, 32, 32), -1.0)
        logits[10:14, 12:18, 12:18] = 1  # voxels 0..8
        logits[:10], logits[30:], logits[:, 30:], logits[..., 30:] = (beyond,) * 4
        look = Look(prompts, window, None, logits=logits)
        assert look.rewindow(volume, (1.0, 1.0, 1.0))
        chosen.append(look.window)
    assert chosen[0] == chosen[1] and chosen[0].size < window.size
    empty = Look(prompts, window, None, logits=torch.full((32, 32, 32), -1.0))
    assert empty.logits is not None
    empty.logits[:10] = 1
    assert not empty.rewindow(volume, (1.0, 1.0, 1.0)), "an object beyond the volume is none"


def _ball_and_layer() -> np.ndarray:
    labels = np.zeros((60, 60, 60), np.uint8)
    grid = np.indices(labels.shape)
    labels[((grid - 20) ** 2).sum(0) < 144] = 3
    labels[:, :, 50] = 3  # less than half a cell
    return labels


def test_the_second_pass_begins_with_the_last_mask_where_the_first_left_it() -> None:
    labels = _ball_and_layer()
    window, fine = (Window((0, 0, 0), (60, 60, 60), (n, n, n)) for n in (12, 60))
    look = Look(ObjectPrompts(3), window, ((0, 0, 0), (60, 60, 60)), labels=labels)
    shown = look.mask_in(window)
    assert shown is not None and not shown[..., 10].any(), "the layer is lost in long cells"
    look.logits = 2 * shown[0] - 1
    coarse = resample(shown, fine.shape)[0].gt(0.5).float()
    assert torch.equal(look.as_fine_as_before(fine, coarse), torch.from_numpy(labels == 3).float())

    look.logits[8:, 8:, 8:] = 1  # something new there
    found = resample(look.logits[None], fine.shape)[0].gt(0).float()
    begun = look.as_fine_as_before(fine, found)
    assert torch.equal(begun[42:, 42:, 42:], found[42:, 42:, 42:]) and begun[42:, 42:, 42:].all()
    np.testing.assert_array_equal(begun[:38] > 0, labels[:38] == 3)

    for nothing in (
        Look(ObjectPrompts(3), window, None, logits=look.logits),
        dataclasses.replace(look, prompts=ObjectPrompts(4)),
    ):
        assert torch.equal(nothing.as_fine_as_before(fine, found), found)


def test_an_object_is_held_to_its_last_mask_but_near_the_newest_click() -> None:
    """The more it has been told the more; distances are in millimetres."""
    labels = np.zeros((20, 60, 60), np.uint8)
    labels[5:15, 20:40, 20:40] = 3
    window = Window((0, 10, 10), (20, 50, 50), (20, 40, 40))
    clicks = tuple(Click((9, 30, 20 + i), True) for i in range(5))
    look = Look(
        ObjectPrompts(3, Box((5, 20, 20), (15, 40, 40), 10), clicks),
        window,
        ((5, 20, 20), (15, 40, 40)),
        labels=labels,
    )
    mask = look.mask_in(window)
    assert mask is not None
    logits, spacing_mm = torch.randn(20, 40, 40), (2.0, 1.0, 1.0)
    pulls = []
    for n in range(6):
        some = dataclasses.replace(look.prompts, clicks=clicks[:n])
        held = dataclasses.replace(look, prompts=some).held(logits, window, spacing_mm)
        pulls.append((held - logits) * (2 * mask[0] - 1))
    assert not pulls[0].any() and not pulls[1].any(), "one click may change everything"
    assert min(pull.min() for pull in pulls) > -1e-5
    far = [float(pull[0, 0, -1]) for pull in pulls]
    assert far[2:] == pytest.approx([1.5 * (n - 1) / n for n in range(2, 6)], rel=0.01)
    last = pulls[5]
    at_click, near, further = (float(last[9, 20, x]) for x in (14, 18, 24))
    assert abs(at_click) < 1e-5 < near < further
    assert float(last[12, 20, 14]) == pytest.approx(float(last[9, 26, 14])), "six millimetres each"

    no_box = dataclasses.replace(look, prompts=dataclasses.replace(look.prompts, box=None))
    pull = (no_box.held(logits, window, spacing_mm) - logits).abs()
    assert float(pull[0, 0, -1]) == pytest.approx(far[4], rel=0.01), "a box is a prompt"
    for other in (dataclasses.replace(look, previous=None), dataclasses.replace(look, labels=None)):
        assert torch.equal(other.held(logits, window, spacing_mm), logits)


def test_a_mask_and_what_was_clicked_on_since_make_a_box() -> None:
    clicks = (Click((5, 30, 30), True), Click((15, 41, 20), True), Click((2, 2, 2), False))
    window = Window((0, 0, 0), (60, 60, 60), (12, 12, 12))
    look = Look(ObjectPrompts(3, clicks=clicks), window, ((4, 10, 12), (12, 40, 35)))
    box = look.boxed().prompts.box
    assert box is not None and (box.start, box.stop) == ((4, 10, 12), (16, 42, 35))
    assert look.prompts.box is None and look.boxed().prompts.clicks == clicks
