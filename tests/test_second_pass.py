"""The second pass: where it looks, what it is shown, and what both passes find together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.case import Box, Click, ObjectPrompts
from inference.geometry import Triple, Window
from inference.model.refiner import CHANNELS, Refiner, RefinerConfig
from inference.second_pass import boundary_tiles, fine_shape, second_window, tile_edge
from inference.segmenter import Segmenter

ISOTROPIC = (1.0, 1.0, 1.0)


@given(
    st.tuples(*[st.integers(1, 700)] * 3), st.integers(0, 9), st.sampled_from([2, 4, 16, 32, 128])
)
def test_the_fine_grid_is_never_coarser_and_keeps_its_budget(
    size: Triple, tiles: int, multiple: int
) -> None:
    region = Window((0, 0, 0), size, (64, 64, 64))
    shape, edge = fine_shape(region, tiles, multiple), tile_edge(multiple)
    assert edge % multiple == 0 and 112 <= edge < 112 + multiple
    assert all(n >= 64 and n % multiple == 0 for n in shape)
    assert all(n < max(64, s) + multiple for n, s in zip(shape, size, strict=True))
    mask = torch.zeros(shape)
    mask[::2] = 1
    found = boundary_tiles(mask, torch.ones(shape), edge)
    assert 1 <= len(found) <= max(1, tiles)
    for tile in found:
        edges = [range(n)[place] for n, place in zip(shape, tile, strict=True)]
        assert math.prod(map(len, edges)) <= edge**3
        assert all(len(cells) % multiple == 0 for cells in edges)


@pytest.mark.parametrize(
    ("size", "tiles", "expected"),
    [
        ((96, 100, 70), 1, (96, 112, 80)),  # voxels
        ((30, 170, 170), 1, (64, 144, 144)),  # flat: as many cells as a cube of 112
        ((224, 224, 224), 4, (112, 112, 112)),  # cells of two voxels are short enough
        ((225, 225, 225), 4, (112, 192, 192)),
        ((225, 225, 225), 2, (112, 112, 192)),
        ((60, 10**12, 10**12), 4, (64, 192, 192)),
    ],
)
def test_the_fine_grid_is_the_volumes_own_or_as_near_as_tiles_allow(
    size: Triple, tiles: int, expected: Triple
) -> None:
    assert fine_shape(Window((0, 0, 0), size, (64, 64, 64)), tiles, 16) == expected


def _ball(radius: float) -> torch.Tensor:
    z, y, x = torch.meshgrid(*[torch.arange(48.0) - 23.5] * 3, indexing="ij")
    return (z**2 + y**2 + x**2) < radius**2


@pytest.mark.parametrize(
    ("voxels", "thick", "thin"),
    [
        (60, None, None),  # a cell is 1.25 voxels long
        (144, None, (24, 96, 96)),
        (192, (31, 130, 112), (48, 96, 96)),
        (960, (155, 650, 112), (280, 400, 112)),
    ],
)
def test_a_second_pass_is_for_thin_objects_and_for_long_cells(
    voxels: int, thick: tuple[int, int, int] | None, thin: tuple[int, int, int] | None
) -> None:
    """First voxel, edge in voxels, cells along an edge; about the ball, an eighth on each side."""
    window = Window((0, 0, 0), (voxels,) * 3, (48,) * 3)
    for radius, expected in ((13, thick), (8, thin)):
        found = second_window(window, _ball(radius), ObjectPrompts(1), ISOTROPIC, 1, 16)
        if expected is None:
            assert found is None
        else:
            start, edge, cells = expected
            assert found == Window((start,) * 3, (start + edge,) * 3, (cells,) * 3)


def test_what_is_looked_at_again_holds_what_was_said_and_stays_in_the_window() -> None:
    window = Window((-40, 0, 0), (160, 200, 200), (48,) * 3)
    found = torch.zeros((48,) * 3, dtype=torch.bool)
    found[1:3, 20:24, 20:40] = True
    assert second_window(window, found & False, ObjectPrompts(1), ISOTROPIC, 1, 16) is None
    clicks = (Click((150, 90, 90), True), Click((20, 10, 10), False))
    for prompts, low, high in (
        (ObjectPrompts(1), (-40, 83, 83), (-27, 100, 167)),
        (ObjectPrompts(1, clicks=clicks), (-40, 83, 83), (151, 100, 167)),
        (ObjectPrompts(1, Box((0, 60, 80), (20, 180, 180), 10)), (-40, 60, 80), (20, 180, 180)),
    ):
        closer = second_window(window, found, prompts, (1.0, 1.0, 2.0), 1, 16)
        assert closer is not None
        assert all(a <= b for a, b in zip(closer.start, low, strict=True))
        assert all(a >= b for a, b in zip(closer.stop, high, strict=True))
        assert all(a >= b for a, b in zip(closer.start, window.start, strict=True))
        assert all(a <= b for a, b in zip(closer.stop, window.stop, strict=True))
        assert min(closer.size) >= 96, "context, and nothing slender"


@pytest.mark.parametrize(("second", "expected"), [(-0.2, 0.2), (-3.5, -2.0), (7.0, 5.0)])
def test_the_first_pass_has_a_third_of_the_say(
    monkeypatch: pytest.MonkeyPatch, second: float, expected: float
) -> None:
    """It says 1 in the middle of the window, -9 elsewhere; the second one says something else."""
    asked = []

    def network(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        first = channels.shape[-1] == 32
        asked.append(first)
        logits = torch.full_like(channels[:, 0], -9.0)
        n = channels.shape[-1]
        inner = slice(n // 4, n - n // 4)
        logits[:, inner, inner, inner] = 1.0 if first else second
        return logits

    monkeypatch.setattr(Segmenter, "_network", network)
    segmenter = Segmenter(Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)))
    segmenter.set_image(np.zeros((96, 96, 96), np.uint8), (1.0, 1.0, 1.0))
    monkeypatch.setattr("inference.segmenter.BOX_ALONE", 0.0)
    box = Box((16, 16, 16), (80, 80, 80), 48)
    (result,) = segmenter.segment([ObjectPrompts(1, box)])
    assert asked == [True, False]
    if expected < 0:
        assert not result.logits.size, "absent"
    else:
        z, y, x = (48 - start for start in result.start)
        assert result.logits[z, y, x] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("coarse", [False, True])
def test_the_second_pass_is_shown_the_logits_of_the_first(
    monkeypatch: pytest.MonkeyPatch, coarse: bool
) -> None:
    """Where it was trained so: 1 in the middle, -9 elsewhere, clamped to 6, in thirds."""
    seen = []

    def network(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        seen.append(channels[0, CHANNELS.index("coarse_logits")])
        logits = torch.full_like(channels[:, 0], -9.0)
        n = channels.shape[-1]
        inner = slice(n // 4, n - n // 4)
        logits[:, inner, inner, inner] = 1.0
        return logits

    monkeypatch.setattr(Segmenter, "_network", network)
    config = RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32, coarse=coarse)
    segmenter = Segmenter(Refiner(config))
    segmenter.set_image(np.zeros((96, 96, 96), np.uint8), (1.0, 1.0, 1.0))
    list(segmenter.segment([ObjectPrompts(1, Box((16, 16, 16), (80, 80, 80), 48))]))
    first, second = seen
    assert not first.any()
    if coarse:
        middle = len(second) // 2
        assert second[middle, middle, middle] == pytest.approx(1 / 3)
        assert second[0, 0, 0] == -2
    else:
        assert not second.any()
