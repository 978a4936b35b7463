"""Prompt channels: every prompt is seen, where it is, and in order."""

from __future__ import annotations

import pytest
import torch

from inference.case import Box, Click, ObjectPrompts
from inference.geometry import Window
from inference.model.refiner import CHANNELS
from inference.prompts import (
    WindowPrompts,
    cells_a_face,
    normalise_window,
    refiner_channels,
    shifted,
    window_prompts,
)

SHAPE = (16, 20, 24)


def _channels(
    prompts: WindowPrompts, previous: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    image = torch.randn(1, *SHAPE)
    mask = torch.zeros(1, *SHAPE) if previous is None else previous
    channels = refiner_channels(image, [prompts], mask, [previous is not None])
    assert channels.shape == (1, len(CHANNELS), *SHAPE) and channels.dtype == torch.float32
    assert channels.isfinite().all()
    return dict(zip(CHANNELS, channels[0], strict=True))


def test_a_click_peaks_at_its_place_in_its_own_map() -> None:
    seen = _channels(WindowPrompts(clicks=(((4, 5, 6), True), ((12, 15, 20), False))))
    positive, negative = seen["positive_clicks"], seen["negative_clicks"]
    assert positive.argmax() == torch.tensor((4 * 20 + 5) * 24 + 6)
    assert negative.argmax() == torch.tensor((12 * 20 + 15) * 24 + 20)
    assert seen["likelihood"][4, 5, 6] > 1 and seen["likelihood"][12, 15, 20] < -1


def test_all_clicks_are_seen_and_newer_ones_speak_louder() -> None:
    places = [(2, 3, 3), (8, 10, 12), (13, 17, 21)]
    seen = _channels(WindowPrompts(clicks=tuple((p, True) for p in places)))["positive_clicks"]
    oldest, middle, newest = (float(seen[p]) for p in places)
    assert 0.5 < oldest < middle < newest == 1.0


def test_a_click_outside_the_window_does_no_harm() -> None:
    seen = _channels(WindowPrompts(clicks=(((-500.0, 3.0, 900.0), True),)))
    assert seen["positive_clicks"].max() == 0


def test_the_box_is_positive_inside_and_zero_on_its_faces() -> None:
    seen = _channels(WindowPrompts(((3.5, 4.5, 5.5), (11.5, 14.5, 17.5)), middle=7))
    inside = torch.zeros(SHAPE, dtype=torch.bool)
    inside[4:12, 5:15, 6:18] = True
    assert torch.equal(seen["box"] > 0, inside)
    assert seen["ellipsoid"][7, 9, 11] > 0.8 and seen["ellipsoid"][4, 5, 6] < 0
    assert (seen["middle_slice"][7] > 0).equal(inside[7])
    assert seen["middle_slice"][7].abs().max() > 10 * seen["middle_slice"][15].abs().max()


def test_without_a_box_and_a_mask_the_object_is_thought_to_be_about_its_positive_clicks() -> None:
    first, second, other = (((4, 5, 6), True), ((12, 15, 20), True), ((8, 10, 12), False))
    one, two, both = (
        _channels(WindowPrompts(clicks=clicks))["ellipsoid"]
        for clicks in ((first,), (second,), (first, other, second))
    )
    assert one.argmax() == torch.tensor((4 * 20 + 5) * 24 + 6) and one.max() > 0 > one.min()
    assert torch.equal(both, torch.maximum(one, two)), "about the nearest one"
    mask = torch.zeros(1, *SHAPE)
    assert not _channels(WindowPrompts(clicks=(first,)), mask)["ellipsoid"].any()


def test_the_previous_mask_is_signed_and_its_absence_is_zero() -> None:
    mask = torch.zeros(1, *SHAPE)
    mask[0, 2:9, 3:9, 3:9] = 1
    assert _channels(WindowPrompts(), mask)["previous_mask"].equal(2 * mask[0] - 1)
    assert not _channels(WindowPrompts())["previous_mask"].any()


def test_clicks_on_other_objects_speak_against_this_one() -> None:
    seen = _channels(WindowPrompts(elsewhere=((4, 5, 6), (4, 6, 6), (-90, 5, 6))))
    assert seen["likelihood"][4, 5, 6] < -1
    assert not seen["negative_clicks"].any(), "the user said nothing about this object"
    assert seen["others"][4, 5, 6] == 1 and seen["others"][12, 15, 20] < 0.01


def test_smaller_boxes_of_other_objects_are_shown_as_blobs_and_larger_ones_counted() -> None:
    box = ((1.5, 1.5, 1.5), (13.5, 17.5, 21.5))
    small = ((2.5, 2.5, 2.5), (5.5, 5.5, 5.5))
    large = ((-12.5, -18.5, 8.5), (27.5, 37.5, 31.5))
    seen = _channels(WindowPrompts(box, 8, others=(small, large, large)))
    others, around = seen["others"], seen["larger_boxes"]
    assert others[4, 4, 4] == 0.5 and others[4, 8, 4] < 0.01
    assert others[7, 9, 20] < 0.01, "the larger ones are not among the blobs"
    assert around[7, 9, 20] == pytest.approx(2 / 3, abs=0.01) and around[7, 9, 3] < 0.1
    crowded = _channels(WindowPrompts(box, 8, elsewhere=((4, 4, 4),), others=(small,) * 9))
    assert crowded["others"][4, 4, 4] == 1, "a click is more than boxes"
    assert crowded["others"][4, 4, 8] <= 0.5 and not crowded["larger_boxes"].any()
    twin = _channels(WindowPrompts(box, 8, others=(box,)))
    assert twin["others"].max() > 0.49 and not twin["larger_boxes"].any()


def test_without_a_box_there_is_nothing_to_compare_boxes_with() -> None:
    seen = _channels(WindowPrompts(others=(((2.5, 2.5, 2.5), (5.5, 5.5, 5.5)),)))
    assert not seen["others"].any() and not seen["larger_boxes"].any()


def test_clicks_are_samples_of_intensities_where_the_mask_is_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def recorded(image, prior, mask, clicks, doubt):  # type: ignore[no-untyped-def]
        seen.append((clicks[0], float(doubt)))
        return prior

    monkeypatch.setattr("inference.prompts.likelihood_log_odds", recorded)
    box = ((1.5, 1.5, 1.5), (14.5, 18.5, 22.5))
    mask = torch.zeros(1, *SHAPE)
    mask[:, 4:12, 6:14, 8:16] = 1  # a cube of 8, as thick as a ball of radius 6
    near, deep, within = ((8, 10, 17), True), ((8, 10, 21), True), ((8, 10, 8), False)

    def told(*clicks: tuple[tuple[int, int, int], bool], boxed: bool = True, known: bool = True):  # type: ignore[no-untyped-def]
        _channels(WindowPrompts(box if boxed else None, 8, clicks), mask if known else None)
        return seen.pop()

    clicks, little = told(near)
    assert clicks == (near,) and 0 < little < 0.4
    assert told(near, deep) == ((near, deep), 1.0), "the newest click says how wrong the mask is"
    assert told(deep, near)[1] == little
    assert 0 < told(within)[1] < 0.2, "half in, by one cell"
    assert told(near, known=False)[1] == 1, "without a mask there are clicks alone"
    assert told(near, boxed=False)[0] == (), "without a box nothing holds intensities back"


def test_prompts_move_with_the_window_and_the_tile() -> None:
    window = Window((10, 0, 20), (26, 40, 44), (8, 20, 24))
    box, away = Box((12, 4, 22), (20, 30, 40), 16), Box((26, 4, 22), (30, 30, 40), 28)
    prompts = ObjectPrompts(1, box, (Click((11, 1, 20), False),))
    found = window_prompts(prompts, window, [(11, 1, 20), (9, 1, 20), (11, 40, 20)], [away, box])
    assert found.clicks == ((window.to_grid((11, 1, 20)), False),)
    assert found.elsewhere == (window.to_grid((11, 1, 20)),), "those outside are left out"
    assert found.others == (found.box,), "those outside are left out"
    moved = shifted(found, (slice(2, 6), slice(3, 9), slice(0, 8)))
    assert moved.others == (moved.box,)
    assert found.box and moved.box and moved.middle == found.middle - 2
    for a, b in zip((*found.box, *found.elsewhere), (*moved.box, *moved.elsewhere), strict=True):
        assert b == (a[0] - 2, a[1] - 3, a[2])
    assert moved.clicks[0][0] == moved.elsewhere[0] and not moved.clicks[0][1]


def test_normalisation_ignores_scale_and_offset() -> None:
    image = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(
        normalise_window(37 * image + 1000), normalise_window(image), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(normalise_window(1e-7 * image), normalise_window(image))
    assert not normalise_window(torch.full((1, 4, 4, 4), 7.0)).any()
    assert not normalise_window(torch.zeros(1, 4, 4, 4)).any()


def test_thickness_is_cells_to_a_face() -> None:
    mask = torch.zeros(48, 48, 48, dtype=torch.bool)
    assert float(cells_a_face(mask)) == 0
    mask[2:4, 1:7, 1:7] = True
    assert float(cells_a_face(mask)) == pytest.approx(2 * 36 / (2 * 36 + 4 * 12))
    z, y, x = torch.meshgrid(*[torch.arange(48.0) - 23.5] * 3, indexing="ij")
    ball = (z**2 + y**2 + x**2) < 18**2
    assert float(cells_a_face(ball)) == pytest.approx(2 / 9 * 18, rel=0.03)
