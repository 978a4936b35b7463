"""What no post-processing step may do, on random masks, clicks and spacings; and what each does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from inference.adaptive_steps import STEPS, Region, apply_step
from inference.case import Box, Click, ObjectPrompts
from inference.refinement import SURE, ObjectLogits, honour_clicks

EVERYWHERE = np.ones((3, 3, 3))


@dataclass
class Scene:
    """An object as the engine hands it over."""

    result: ObjectLogits
    region: Region
    prompts: ObjectPrompts

    @property
    def mask(self) -> np.ndarray:
        return self.result.logits > 0


def around(spot: tuple[int, ...], reach: int) -> tuple[slice, ...]:
    return tuple(slice(max(p - reach, 0), p + reach + 1) for p in spot)


@st.composite
def scenes(draw) -> Scene:
    """Blobs with specks and holes, up to four clicks on either side, perhaps a box."""
    shape = draw(st.tuples(*[st.integers(1, 14)] * 3))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    field = ndimage.gaussian_filter(random.normal(size=shape), draw(st.floats(0.4, 2.5)))
    field = (field - np.quantile(field, draw(st.floats(0.2, 0.8)))) / max(field.std(), 1e-6)
    specks = random.random(shape) < draw(st.floats(0, 0.2))
    field[specks] = random.normal(size=int(specks.sum()))
    logits = (field * draw(st.floats(0.5, 4))).astype(np.float32)
    start = draw(st.tuples(*[st.integers(0, 5)] * 3))
    spots = st.tuples(*[st.integers(0, n - 1) for n in shape])
    clicks = {spot: draw(st.booleans()) for spot in draw(st.lists(spots, max_size=3))}
    if draw(st.booleans()):  # a hole with a background click in it
        hole = tuple(n // 2 for n in shape)
        logits[around(hole, 2)] = 2
        logits[around(hole, 1)] = -2
        clicks[hole] = False
    box = None
    if draw(st.booleans()):
        first, last = sorted((draw(spots), draw(spots)))
        low = tuple(min(pair) for pair in zip(first, last, strict=True))
        high = tuple(max(pair) + 1 for pair in zip(first, last, strict=True))
        centre = tuple((p + q - 1) // 2 for p, q in zip(low, high, strict=True))
        if draw(st.booleans()):  # the object's part at the box centre is a speck of its own
            logits[around(centre, 1)] = -2
            logits[centre] = 0.1
        low, high = (
            tuple(p + a for p, a in zip(corner, start, strict=True)) for corner in (low, high)
        )
        box = Box(low, high, low[0])
    given = tuple(
        Click(tuple(p + a for p, a in zip(spot, start, strict=True)), positive)
        for spot, positive in clicks.items()
    )
    prompts = ObjectPrompts(1, box, given)
    result = honour_clicks(ObjectLogits(1, start, logits), given)
    spacing_mm = draw(st.tuples(*[st.floats(0.3, 5.0)] * 3))
    return Scene(result, Region.of(result, prompts, spacing_mm), prompts)


AMOUNTS = st.sampled_from((0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0))


def anchored_components(scene: Scene) -> list[np.ndarray]:
    components, _ = ndimage.label(scene.mask, EVERYWHERE)
    numbers = {int(components[anchor]) for anchor in scene.region.anchors}
    return [components == number for number in numbers if number]


def clicked_cavities(scene: Scene) -> list[np.ndarray]:
    holes = ndimage.binary_fill_holes(scene.mask) & ~scene.mask
    components, _ = ndimage.label(holes)
    numbers = {int(components[click]) for click in scene.region.negative}
    return [components == number for number in numbers if number]


@settings(max_examples=100)
@given(scenes(), AMOUNTS)
@pytest.mark.parametrize("step", STEPS)
def test_no_step_breaks_a_guarantee(step, scene, amount):
    given_logits = scene.result.logits.copy()
    after = apply_step(step, scene.result.logits, scene.region, amount) > 0
    assert np.array_equal(scene.result.logits, given_logits), "the input is left as it is"
    for click in scene.region.positive:
        assert after[click]
    for click in scene.region.negative:
        assert not after[click]
    for component in anchored_components(scene):
        assert (after & component).any(), "the component of a click or the box centre is gone"
    for cavity in clicked_cavities(scene):
        assert not (after & cavity).any(), "a hole with a background click was filled"


@settings(max_examples=100)
@given(scenes(), st.lists(AMOUNTS, min_size=len(STEPS), max_size=len(STEPS)))
def test_all_steps_together_honour_clicks_and_anchors(scene, amounts):
    logits = scene.result.logits
    for step, amount in zip(STEPS, amounts, strict=True):
        logits = apply_step(step, logits, scene.region, amount)
    for click in scene.region.positive:
        assert logits[click] > SURE
    for click in scene.region.negative:
        assert logits[click] < -SURE
    for component in anchored_components(scene):
        assert ((logits > 0) & component).any()


def test_the_box_centre_stays_where_closing_joins_it_to_more_and_smoothing_takes_it():
    logits = np.array([[[0.1, -2, 2.1], [-2, -2, 1.26]]], np.float32)
    region = Region((1.0, 1.0, 1.0), (), (), centre=(0, 0, 0), slices=(0, 1))
    for step, amount in zip(STEPS, [0.01] * 4 + [0.3] * 2, strict=True):
        logits = apply_step(step, logits, region, amount)
    assert logits[0, 0, 0] > 0


@settings(max_examples=80)
@given(scenes(), st.floats(0.02, 0.25))
def test_what_is_thinner_than_the_kernel_is_never_smoothed_away(scene, amount):
    mask = scene.mask
    if not mask.any():
        return
    sigma = np.array(scene.region.reach(amount, mask))
    half = np.rint(math.sqrt(2 * math.log(2)) * sigma).astype(int)
    padded = np.pad(mask, [(h, h) for h in half], mode="edge")
    # Outside of the padding SciPy's erosion assumes background; one more layer keeps it away.
    padded = np.pad(padded, [(h, h) for h in half], mode="edge")
    opened = ndimage.binary_opening(padded, np.ones(2 * half + 1))
    inner = tuple(slice(2 * h, 2 * h + n) for h, n in zip(half, mask.shape, strict=True))
    thin = mask & ~opened[inner]
    after = apply_step("smooth", scene.result.logits, scene.region, amount) > 0
    negative = np.zeros(mask.shape, bool)
    for click in scene.region.negative:
        negative[click] = True
    assert (after | ~thin | negative).all()


@settings(max_examples=60)
@given(scenes(), AMOUNTS)
def test_closing_leaves_a_clicked_gap_alone(scene, amount):
    before = scene.mask
    after = apply_step("gaps", scene.result.logits, scene.region, amount) > 0
    for click in scene.region.negative:
        added = (after & ~before)[around(click, 1)]
        assert not added.any(), "filled right beside a background click"


def ball(radius: float, shape=(24, 24, 24), centre=(12, 12, 12), inside=4.0) -> np.ndarray:
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    distance = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) ** 0.5
    return np.where(distance <= radius, inside, -4.0).astype(np.float32)


ISOTROPIC = Region((1.0, 1.0, 1.0))


def test_islands_go_by_their_share_of_the_largest():
    logits = np.maximum(ball(6), ball(2, centre=(3, 3, 3)))
    largest = np.count_nonzero(ball(6) > 0)
    share = np.count_nonzero(ball(2) > 0) / largest
    gone = apply_step("islands", logits, ISOTROPIC, share + 0.001)
    assert np.count_nonzero(gone > 0) == largest
    assert apply_step("islands", logits, ISOTROPIC, share - 0.001) is logits
    clicked = Region((1.0, 1.0, 1.0), positive=((3, 3, 3),))
    assert apply_step("islands", logits, clicked, 1.0) is logits
    centred = Region((1.0, 1.0, 1.0), centre=(3, 3, 3))
    assert apply_step("islands", logits, centred, 1.0) is logits


def test_cavities_fill_up_to_their_share():
    logits = np.where(ball(2) > 0, -4, ball(7)).astype(np.float32)
    hole = np.count_nonzero(ball(2) > 0)
    share = hole / np.count_nonzero(logits > 0)
    filled = apply_step("cavities", logits, ISOTROPIC, share + 0.001)
    assert np.array_equal(filled > 0, ball(7) > 0)
    assert (filled[ball(2) > 0] < 0.1).all(), "barely, so that other objects may have it"
    assert apply_step("cavities", logits, ISOTROPIC, share - 0.001) is logits


def test_an_object_without_outside_has_its_cavity_filled_too():
    logits = np.full((5, 5, 5), 3, np.float32)
    logits[2, 2, 2] = -3
    assert (apply_step("cavities", logits, ISOTROPIC, 1.0) > 0).all()


def test_lengths_are_millimetres():
    # Two plates 2 slices apart; the diameter of their volume decides how far closing reaches.
    logits = np.full((6, 12, 12), -3, np.float32)
    logits[[1, 4]] = 3
    voxels = np.count_nonzero(logits > 0)
    for depth_mm in (1.0, 4.0):
        region = Region((depth_mm, 1.0, 1.0))
        diameter = 2 * (voxels * depth_mm * 3 / (4 * math.pi)) ** (1 / 3)
        reaches = apply_step("gaps", logits, region, 1.2 * depth_mm / diameter)
        assert (reaches[1:5] > 0).all()
        short = apply_step("gaps", logits, region, 0.4 * depth_mm / diameter)
        assert not (short[2:4] > 0).any()


def test_trim_keeps_the_slices_of_the_box_and_its_margin():
    region = Region((1.0, 1.0, 1.0), slices=(8, 16))
    kept = np.flatnonzero((apply_step("trim", ball(9), region, 0.01) > 0).any((1, 2)))
    assert (kept.min(), kept.max()) == (8, 15)
    kept = np.flatnonzero((apply_step("trim", ball(9), region, 0.5) > 0).any((1, 2)))
    assert (kept.min(), kept.max()) == (6, 17)
    logits = ball(9)
    assert apply_step("trim", logits, ISOTROPIC, 0.1) is logits, "no box, no slices"


def test_threshold_is_lowered_by_log_odds():
    logits = np.linspace(-2, 2, 27, dtype=np.float32).reshape(3, 3, 3)
    after = apply_step("threshold", logits, ISOTROPIC, 0.5)
    assert np.array_equal(after > 0, 1 / (1 + np.exp(-logits)) > 0.3775)  # .3775: odds of e^-.5
    added = (after > 0) & (logits <= 0)
    assert added.sum() == 4
    assert (after[added] < 0.1).all(), "it must not outvote an object that is surer of the voxel"
    assert np.array_equal(after[~added], logits[~added])


def test_smoothing_takes_the_bump_and_keeps_the_sheet():
    logits = ball(8)
    logits[12, 12, 20] = logits[12, 12, 21] = 0.2  # a bump that a kernel of its size covers
    logits[12, 0:3] = 4  # and a sheet one voxel thick
    after = apply_step("smooth", logits, ISOTROPIC, 0.1)
    assert (after[12, 0:3] > 0).all()
    dented = ball(8)
    dented[12, 12, 19] = -0.2
    assert apply_step("smooth", dented, ISOTROPIC, 0.05)[12, 12, 19] > 0


def test_region_moves_prompts_into_the_cut_out_and_lets_the_newest_click_count():
    prompts = ObjectPrompts(
        1,
        Box((2, 4, 6), (7, 9, 11), 4),
        (Click((3, 5, 7), True), Click((0, 0, 0), False), Click((3, 5, 7), False)),
    )
    result = ObjectLogits(1, (1, 2, 3), np.zeros((8, 8, 8), np.float32))
    region = Region.of(result, prompts, (3.0, 2.0, 1.0))
    assert region == Region((3.0, 2.0, 1.0), (), ((2, 3, 4),), (3, 4, 5), (1, 6))


def test_nothing_stays_nothing():
    nothing = np.full((4, 4, 4), -1, np.float32)
    for step in STEPS:
        assert apply_step(step, nothing, ISOTROPIC, 0.5) is nothing


@pytest.mark.parametrize("amount", [0, -1, math.nan, math.inf])
def test_amounts_are_above_zero(amount):
    with pytest.raises(ValueError, match="above 0"):
        apply_step("smooth", ball(3), ISOTROPIC, amount)


def test_unknown_steps_are_refused():
    with pytest.raises(ValueError, match=r"'polish'.*threshold, trim"):
        apply_step("polish", ball(3), ISOTROPIC, 1)


@pytest.mark.parametrize("step", STEPS)
def test_voxels_may_be_a_million_times_as_long_as_wide(step):
    logits = np.random.default_rng(0).normal(0, 2, (4, 9, 9)).astype(np.float32)
    region = Region((1e6, 1e-6, 1e-6), (), ())
    assert apply_step(step, logits, region, 0.1).shape == logits.shape
