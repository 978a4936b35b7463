"""Windows: points survive both maps, crops know where they are, regions are wide enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inference.geometry import SLENDEREST, Window, window_around

triples = st.tuples(*[st.integers(-30, 60)] * 3)
sizes = st.tuples(*[st.integers(1, 70)] * 3)
points = st.tuples(*[st.floats(-50, 150)] * 3)


@st.composite
def windows(draw: st.DrawFn) -> Window:
    start, size = draw(triples), draw(sizes)
    stop = tuple(a + n for a, n in zip(start, size, strict=True))
    return Window(start, stop, draw(sizes))  # type: ignore[arg-type]


@given(windows(), points)
def test_a_point_survives_both_maps(window: Window, point: tuple[float, float, float]) -> None:
    there = window.to_grid(point)
    np.testing.assert_allclose(window.to_volume(there), point, atol=1e-9)


@given(windows())
def test_faces_of_voxels_and_cells_coincide(window: Window) -> None:
    np.testing.assert_allclose(window.to_grid([a - 0.5 for a in window.start]), [-0.5] * 3)
    np.testing.assert_allclose(
        window.to_grid([b - 0.5 for b in window.stop]), [n - 0.5 for n in window.shape]
    )


def test_a_window_of_voxels_is_the_identity_up_to_its_start() -> None:
    window = Window((3, -2, 7), (8, 9, 8), (5, 11, 1))
    assert window.to_grid((3, -2, 7)) == (0, 0, 0)
    assert window.to_grid((7, 8, 7)) == (4, 10, 0)


@given(windows(), st.tuples(*[st.integers(1, 20)] * 3))
@example(Window((0, -19, 0), (1, 43, 1), (1, 47, 1)), (1, 12, 1))  # a centre on the face
def test_cells_with_their_centre_in_the_volume_are_inside(
    window: Window, shape: tuple[int, int, int]
) -> None:
    for axis, found in enumerate(window.inside(shape)):
        cells = np.arange(window.shape[axis])
        # Twice as many voxels, and cells as fractions of them, are whole numbers.
        n, size = window.shape[axis], window.size[axis]
        centres = [2 * n * window.start[axis] + (2 * int(i) + 1) * size for i in cells]
        expected = [0 <= centre < 2 * n * shape[axis] for centre in centres]
        assert cells[found].tolist() == cells[expected].tolist()


@given(windows(), st.data())
@example(Window((0, 0, 0), (112, 8, 8), (48, 8, 8)), None)
def test_a_box_of_cells_touches_the_voxels_it_overlaps(
    window: Window, data: st.DataObject | None
) -> None:
    low, high = (0, 0, 0), (27, 1, 1)
    if data is not None:
        low = data.draw(st.tuples(*[st.integers(0, n - 1) for n in window.shape]))
        high = data.draw(
            st.tuples(*[st.integers(a + 1, n) for a, n in zip(low, window.shape, strict=True)])
        )
    for axis, (start, stop) in enumerate(zip(*window.voxels(low, high), strict=True)):
        size, cells, first = window.size[axis], window.shape[axis], window.start[axis]
        # In parts of a voxel of which a cell has size, a voxel as many as there are cells.
        touched = [
            first + v
            for v in range(size)
            if v * cells < high[axis] * size and (v + 1) * cells > low[axis] * size
        ]
        assert list(range(start, stop)) == touched


@pytest.mark.parametrize(
    ("start", "stop", "shape"),
    [
        ((0, 0, 0), (0, 4, 4), (4, 4, 4)),
        ((0, 0, 0), (4, 4, 4), (4, 0, 4)),
        ((5, 0, 0), (4, 4, 4), (1, 1, 1)),
    ],
)
def test_an_empty_window_is_refused(start, stop, shape) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="accepted: stop > start"):
        Window(start, stop, shape)


def test_the_region_is_the_box_times_the_scale() -> None:
    window = window_around((10, 20, 30), (30, 40, 50), (64, 64, 64), (3.0, 3.0, 3.0), 1.8)
    assert window.start == (2, 12, 22) and window.stop == (38, 48, 58)


def test_a_slender_box_gets_a_wide_region_in_millimetres() -> None:
    # 60 slices of 3 mm, 4 rows of 2 mm, 5 columns of 1 mm: 180 mm long
    window = window_around((0, 50, 50), (60, 54, 55), (64, 64, 64), (3.0, 2.0, 1.0), 1.0)
    assert window.size == (60, round(SLENDEREST * 180 / 2), round(SLENDEREST * 180 / 1))
    assert abs((window.start[1] + window.stop[1]) / 2 - 52) <= 0.5


def test_a_single_voxel_gets_a_region_of_eight() -> None:
    window = window_around((5, 5, 5), (6, 6, 6), (64, 64, 64), (3.0, 2.0, 1.0), 1.8)
    assert window.size[0] == 8 and min(window.size) >= 8
