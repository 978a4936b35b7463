"""Windows, click guarantees and merging, on plain arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.case import Box, Click, ObjectPrompts
from inference.geometry import Window
from inference.refinement import (
    FIRST_LOOKS,
    ObjectLogits,
    bounding_box,
    bounding_boxes,
    first_windows,
    grown_window,
    honour_clicks,
    merge,
    to_voxels,
    touched_faces,
)
from inference.resampling import resample

SHAPE = (12, 14, 16)
GRID = (16, 16, 16)
voxels = st.tuples(*[st.integers(0, n - 1) for n in SHAPE])
clicks = st.builds(Click, voxels, st.booleans())


@st.composite
def object_logits(draw: st.DrawFn, label: int) -> ObjectLogits:
    start = draw(voxels)
    size = tuple(draw(st.integers(0, n - a)) for a, n in zip(start, SHAPE, strict=True))
    seed = draw(st.integers(0, 2**16))
    values = np.random.default_rng(seed).normal(0, 50, size).astype(np.float32)
    return ObjectLogits(label, start, values)


@given(st.data())
def test_every_click_has_its_way_whatever_the_network_says(data: st.DataObject) -> None:
    said = [data.draw(st.lists(clicks, max_size=6)) for _ in range(3)]
    results = [honour_clicks(data.draw(object_logits(k + 1)), said[k]) for k in range(3)]
    labels = merge(results, SHAPE)
    for k in range(3):
        for age, click in enumerate(said[k]):
            newer_own = [c for c in said[k][age + 1 :] if c.position == click.position]
            # another object's positive click on the voxel contends, the newer one wins
            rivals = [
                c
                for other in range(3)
                if other != k
                for c in said[other]
                if c.position == click.position and c.positive
            ]
            if newer_own:
                continue
            if not click.positive:
                assert labels[click.position] != k + 1
            elif not rivals:
                assert labels[click.position] == k + 1


def test_of_two_objects_clicked_on_one_voxel_the_newer_click_wins() -> None:
    empty = np.zeros((0, 0, 0), np.float32)
    here, there = (3, 4, 5), (1, 1, 1)
    first = honour_clicks(ObjectLogits(1, (0, 0, 0), empty), [Click(here, True)])
    second = honour_clicks(
        ObjectLogits(2, (0, 0, 0), empty), [Click(there, True), Click(here, True)]
    )
    assert merge([first, second], SHAPE)[here] == 2
    assert merge([second, first], SHAPE)[here] == 2


@given(st.data())
def test_a_click_changes_nothing_but_its_voxel_here(data: st.DataObject) -> None:
    result = data.draw(object_logits(1))
    click = data.draw(clicks)
    before = merge([ObjectLogits(1, result.start, result.logits.copy())], SHAPE)
    after = merge([honour_clicks(result, [click])], SHAPE)
    before[click.position] = after[click.position] = 0
    np.testing.assert_array_equal(after, before)


def test_objects_compete_by_logit_and_not_by_order() -> None:
    rng = np.random.default_rng(0)
    results = [
        ObjectLogits(k, (0, 0, 0), rng.normal(size=SHAPE).astype(np.float32)) for k in (1, 2, 3)
    ]
    labels = merge(results, SHAPE)
    np.testing.assert_array_equal(merge(results[::-1], SHAPE), labels)
    stack = np.stack([np.zeros(SHAPE)] + [r.logits for r in results])
    np.testing.assert_array_equal(labels, stack.argmax(0))


@given(st.data())
def test_the_first_window_holds_box_clicks_and_previous_mask(data: st.DataObject) -> None:
    said = tuple(data.draw(st.lists(clicks, max_size=4)))
    a, b = data.draw(voxels), data.draw(voxels)
    low = tuple(min(p, q) for p, q in zip(a, b, strict=True))
    high = tuple(max(p, q) + 1 for p, q in zip(a, b, strict=True))
    box = Box(low, high, low[0]) if data.draw(st.booleans()) else None  # type: ignore[arg-type]
    previous = (low, high) if data.draw(st.booleans()) else None
    if box is None and not said:
        return
    prompts = ObjectPrompts(1, box, said)
    windows = first_windows(prompts, previous, SHAPE, (3.0, 2.0, 1.0), GRID)  # type: ignore[arg-type]
    inside = [c.position for c in said]
    if box is not None or previous is not None:
        inside += [low, tuple(n - 1 for n in high)]  # type: ignore[list-item]
    assert len(windows) == (1 if box is not None or previous is not None else len(FIRST_LOOKS))
    for window in windows:
        assert window.shape == GRID
        for point in inside:
            assert all(a <= p < b for a, p, b in zip(window.start, point, window.stop, strict=True))


def test_a_window_grows_only_where_it_is_touched_and_inside_the_volume() -> None:
    window = Window((10, 10, 10), (30, 30, 30), GRID)
    mask = np.zeros(GRID, bool)
    mask[0, 4:8, 4:8] = True  # lower z
    mask[4:8, 4:8, -1] = True  # upper x
    faces = touched_faces(mask, window, (100, 100, 30))
    assert faces == ((True, False), (False, False), (False, False))  # x ends with the volume
    grown = grown_window(window, faces, (100, 100, 30))
    assert grown.start == (0, 10, 10) and grown.stop == (30, 30, 30)


def test_growing_reaches_the_whole_volume_and_stops() -> None:
    window, volume = Window((40, 40, 40), (48, 48, 48), GRID), (100, 90, 80)
    for _ in range(12):
        faces = touched_faces(np.ones(GRID, bool), window, volume)
        window = grown_window(window, faces, volume)
    assert all(a <= 0 for a in window.start)
    assert all(b >= n for b, n in zip(window.stop, volume, strict=True))
    assert max(window.size) < 150


@given(st.data())
def test_bounding_box_equals_argwhere(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    mask = np.random.default_rng(seed).random(SHAPE) > data.draw(st.sampled_from([0.5, 0.99, 1.0]))
    box = bounding_box(mask)
    where = np.argwhere(mask)
    if not len(where):
        assert box is None
    else:
        assert box == (tuple(where.min(0)), tuple(where.max(0) + 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1, 3, 255]))
def test_bounding_boxes_of_labels_equal_those_of_their_masks(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.integers(0, most + 1, SHAPE) * (rng.random(SHAPE) > 0.98)).astype(np.uint8)
    boxes = bounding_boxes(labels)
    for label in range(1, 256):
        assert boxes.get(label) == bounding_box(labels == label)


def test_first_looks_without_a_box_are_cubes_in_millimetres() -> None:
    prompts = ObjectPrompts(1, None, (Click((50, 50, 50), True),))
    windows = first_windows(prompts, None, (100, 120, 400), (4.0, 2.0, 1.0), GRID)
    for window, share in zip(windows, FIRST_LOOKS, strict=True):
        np.testing.assert_allclose(np.multiply(window.size, (4, 2, 1)), 400 * share, atol=8)


def test_nothing_said_and_nothing_found_stays_empty() -> None:
    empty = ObjectLogits(1, (0, 0, 0), np.zeros((0, 0, 0), np.float32))
    assert honour_clicks(empty, [Click((1, 2, 3), False)]) is empty
    assert not merge([empty], SHAPE).any()


def test_a_crowd_of_rounds_cannot_overflow() -> None:
    result = ObjectLogits(1, (0, 0, 0), np.full(SHAPE, 1e9, np.float32))
    honoured = honour_clicks(result, [Click((0, 0, 0), True)] * 50 + [Click((0, 0, 0), False)])
    assert merge([honoured], SHAPE)[0, 0, 0] == 0
    assert np.isfinite(honoured.logits).all()


@pytest.mark.parametrize("size", [(7, 40, 100), (64, 20, 33)])
def test_the_cut_to_positive_voxels_loses_none(size: tuple[int, int, int]) -> None:
    logits = torch.full((32, 32, 32), -2.0)
    logits[10:20, 3:9, 25:32] = torch.randn(10, 6, 7)
    window = Window(
        (-3, 5, 2), tuple(a + n for a, n in zip((-3, 5, 2), size, strict=True)), (32, 32, 32)
    )  # type: ignore[arg-type]
    volume = (50, 30, 90)
    part = to_voxels(logits, window, 1, volume)
    whole = np.full(volume, -9.0, np.float32)
    inside = tuple(slice(max(a, 0), b) for a, b in zip(window.start, window.stop, strict=True))
    place = tuple(slice(max(-a, 0), n - a) for a, n in zip(window.start, volume, strict=True))
    whole[inside] = resample(logits[None], window.size)[0].numpy()[place]
    pasted = np.full(volume, -9.0, np.float32)
    cut = tuple(slice(a, a + n) for a, n in zip(part.start, part.logits.shape, strict=True))
    pasted[cut] = part.logits
    np.testing.assert_array_equal(pasted > 0, whole > 0)
    np.testing.assert_allclose(pasted[whole > 0], whole[whole > 0], atol=1e-5)


@pytest.mark.parametrize(("cells", "found"), [(0, []), (1, [[3, 3, 3]]), (9, [[3, 3, 3]])])
def test_what_fills_half_of_no_voxel_keeps_the_most_probable_one(
    cells: int, found: list[list[int]]
) -> None:
    """Eight cells are one voxel long."""
    logits = torch.full((64, 64, 64), -4.0)
    logits[26:28, 26:28, 26 : 26 + cells] = 1
    part = to_voxels(logits, Window((0, 0, 0), (8, 8, 8), (64, 64, 64)), 1, (8, 8, 8))
    assert (np.argwhere(part.logits > 0) + part.start).tolist() == found


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("start", [-128, -40, 60])
def test_what_lies_beyond_the_volume_is_nothing(axis: int, start: int) -> None:
    """Networks say anything there."""
    logits = torch.full((64, 64, 64), -6.0)
    place = [slice(10, 20)] * 3
    place[axis] = slice(2, 8)
    logits[place[0], place[1], place[2]] = 3
    low = [0, 0, 0]
    low[axis] = start
    window = Window((low[0], low[1], low[2]), (low[0] + 128, low[1] + 128, low[2] + 128), (64,) * 3)
    volume = [100, 100, 100]
    volume[axis] = 60
    assert to_voxels(logits, window, 1, (volume[0], volume[1], volume[2])).logits.size == 0
