"""Objects told apart by their intensities, put side by side."""

from __future__ import annotations

import numpy as np
import pytest

from inference import appearance
from inference.appearance import intensity_log_odds, with_intensity_evidence
from inference.case import Box, Case, Click, ObjectPrompts
from inference.refinement import SURE, ObjectLogits, honour_clicks, merge

SHAPE = (24, 26, 28)
BOX = Box((4, 4, 4), (20, 22, 24), 12)


def _nested(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A dark core (label 2) in a bright shell (label 1) on grey, and the image of it."""
    grid = np.indices(SHAPE).transpose(1, 2, 3, 0) - np.array(SHAPE) / 2
    radius = np.sqrt((grid**2).sum(-1))
    truth = np.where(radius < 5, 2, np.where(radius < 9, 1, 0))
    noise = np.random.default_rng(seed).normal(0, 12, SHAPE)
    return np.array([100.0, 200.0, 20.0])[truth] + noise, truth.astype(np.uint8)


def _case(
    image: np.ndarray, clicks: tuple[Click, ...] = (), boxed: tuple[int, ...] = (1, 2)
) -> Case:
    objects = tuple(ObjectPrompts(i, BOX if i in boxed else None, clicks) for i in (1, 2, 3))
    return Case("nested.npz", image, (1.0, 1.0, 1.0), objects)


def _guesses() -> list[ObjectLogits]:
    """What networks make of them: about the right places, the core's two voxels off."""
    grid = np.indices(SHAPE).transpose(1, 2, 3, 0) - np.array(SHAPE) / 2
    radius = np.sqrt((grid**2).sum(-1)).astype(np.float32)
    off = np.sqrt(((grid - np.array([0, 0, 2])) ** 2).sum(-1)).astype(np.float32)
    shell = np.minimum(9 - radius, 3)
    return [ObjectLogits(1, (0, 0, 0), shell), ObjectLogits(2, (0, 0, 0), 12 - 2 * off)]


def _dice(a: np.ndarray, b: np.ndarray) -> list[float]:
    return [2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum()) for k in (1, 2)]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_objects_in_one_box_come_apart_whatever_the_unit_of_intensities(scale: float) -> None:
    image, truth = _nested()
    unsure = [ObjectLogits(one.label, one.start, one.logits / 2) for one in _guesses()]
    before = _dice(merge(unsure, SHAPE), truth)
    case = _case((image * scale).astype(np.float32))
    after = _dice(merge(with_intensity_evidence(unsure, case), SHAPE), truth)
    assert after[0] > before[0] + 0.01 and after[1] > before[1] + 0.05, (before, after)


def test_objects_that_look_like_their_surroundings_stay_as_they_are() -> None:
    image = np.random.default_rng(3).normal(100, 12, SHAPE)
    before, after = (
        merge(some, SHAPE)
        for some in (_guesses(), with_intensity_evidence(_guesses(), _case(image)))
    )
    assert (before == after).mean() > 0.97
    flat = with_intensity_evidence(_guesses(), _case(np.full(SHAPE, 7, np.int16)))
    for one, other in zip(flat, _guesses(), strict=True):
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)


def test_intensities_count_as_far_as_they_depend_on_the_object() -> None:
    """Between objects, as in tissues, or between objects and the rest, as in nuclei."""
    _, truth = _nested()
    noise = np.random.default_rng(1).normal(0, 12, SHAPE)

    def change(background: float, shell: float, core: float) -> float:
        image = np.array([background, shell, core])[truth] + noise
        told = with_intensity_evidence(_guesses(), _case(image))
        return max(
            float(np.abs(a.logits - b.logits).max()) for a, b in zip(told, _guesses(), strict=True)
        )

    tissues, nuclei, cells = change(100, 200, 20), change(20, 200, 200), change(100, 106, 106)
    assert tissues > 3 and nuclei > 3 and cells < 0.3, (tissues, nuclei, cells)


def test_clicks_keep_their_logits_and_boxes_of_voxels_their_places() -> None:
    image, _ = _nested()
    clicks = (Click((12, 13, 14), True), Click((12, 13, 21), False))
    first, second = _guesses()
    objects = [
        honour_clicks(first, clicks),
        ObjectLogits(2, (5, 6, 7), second.logits[5:19, 6:20, 7:21]),
        ObjectLogits(3, (0, 0, 0), np.zeros((0, 0, 0), np.float32)),
    ]
    result = list(with_intensity_evidence(objects, _case(image, clicks)))
    assert [(one.label, one.start, one.stop) for one in result] == [
        (one.label, one.start, one.stop) for one in objects
    ]
    for click in clicks:
        assert result[0].logits[click.position] == objects[0].logits[click.position]
        assert abs(result[0].logits[click.position]) > SURE
    # What was filled up about the clicks stays where it was, as far as a logit goes.
    others = np.ones(image.shape, bool)
    for click in clicks:
        others[click.position] = False
    assert np.abs(result[0].logits[others]).max() <= SURE
    assert result[0].logits.dtype == np.float32
    assert np.abs(result[1].logits - objects[1].logits).max() > 1  # and it did something


def test_a_single_object_and_too_many_voxels_pass_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, _ = _nested()
    (alone,) = with_intensity_evidence(_guesses()[:1], _case(image))
    np.testing.assert_array_equal(alone.logits, _guesses()[0].logits)
    monkeypatch.setattr(appearance, "_MOST_VOXELS", 2 * image.size - 1)
    taken = []

    def stream():
        for one in [*_guesses(), ObjectLogits(3, (0, 0, 0), np.ones(SHAPE, np.float32))]:
            taken.append(one.label)
            yield one

    passed = with_intensity_evidence(stream(), _case(image))
    for other, one in zip(_guesses(), passed, strict=False):
        assert taken == [1, 2]  # no more is held than has to be
        np.testing.assert_array_equal(one.logits, other.logits)
    assert [one.label for one in passed] == [3]


def test_without_a_box_intensities_count_the_more_the_more_clicks_there_are() -> None:
    image, _ = _nested()
    places = ((12, 13, 14), (11, 12, 13), (13, 14, 15), (12, 15, 14))

    def change(clicks: int, boxed: tuple[int, ...]) -> list[float]:
        """Mean change of each object's logits where no click is near."""
        case = _case(image, tuple(Click(p, True) for p in places[:clicks]), boxed)
        told = with_intensity_evidence(_guesses(), case)
        changes = [np.abs(a.logits - b.logits) for a, b in zip(told, _guesses(), strict=True)]
        return [float(one[:, :4].mean()) for one in changes]

    assert change(0, ()) == [0, 0]
    one, four, box = (change(*values) for values in ((1, ()), (4, ()), (4, (1, 2))))
    assert all(0 < a < b < c for a, b, c in zip(one, four, box, strict=True)), (one, four, box)
    mixed = change(4, (1,))
    assert (mixed[0], mixed[1]) == (box[0], four[1])


@pytest.mark.parametrize("boxed", [True, False])
def test_training_hears_of_one_object_what_inference_adds_to_it(boxed: bool) -> None:
    image, _ = _nested()
    clicks = (Click((12, 13, 14), True), Click((12, 13, 21), False))
    told = with_intensity_evidence(_guesses(), _case(image, clicks, (1, 2) if boxed else ()))
    found = merge(_guesses(), SHAPE)
    for after, before in zip(told, _guesses(), strict=True):
        labels = np.where(found == before.label, 1, 2 * (found > 0)).astype(np.uint8)
        evidence = intensity_log_odds(image, labels, [clicks[0].position], len(clicks), boxed)
        assert np.abs(evidence).max() > 0.2
        np.testing.assert_array_equal(after.logits, before.logits + evidence)


def test_clicks_say_what_an_object_looks_like_where_its_mask_is_wrong() -> None:
    image, truth = _nested()
    shell, inner = _guesses()
    first = ObjectLogits(1, (0, 0, 0), shell.logits.clip(-0.5, 0.5))
    # The core is taken to lie half in the shell, without much confidence.
    wrong = ObjectLogits(2, (0, 0, 0), np.roll(inner.logits, 4, 2).clip(-0.5, 0.5))

    def core(clicks: tuple[Click, ...]) -> float:
        objects = (ObjectPrompts(1, BOX), ObjectPrompts(2, BOX, clicks))
        case = Case("nested.npz", image, (1.0, 1.0, 1.0), objects)
        told = merge(with_intensity_evidence([first, wrong], case), SHAPE)
        return _dice(told, truth)[1]

    places = ((12, 13, 14), (11, 12, 13), (13, 14, 15), (12, 15, 14))
    after = [core(tuple(Click(p, True) for p in places[:n])) for n in range(5)]
    assert after[4] > after[0] + 0.1, after
    assert after[1] <= after[2] <= after[4], after


def test_clicks_count_as_much_as_the_mask_however_many_there_are() -> None:
    """They lie where masks were wrong, so five of them are not five times the truth."""
    image, truth = _nested()
    bright = (4, 13, 14)
    assert truth[bright] == 1
    labels = np.where(truth == 2, 1, 2 * (truth == 1)).astype(np.uint8)
    none, one, five = (intensity_log_odds(image, labels, [bright] * n, 5, True) for n in (0, 1, 5))
    shell, core = truth == 1, truth == 2
    assert none[shell].mean() < 0 < one[shell].mean(), "the click is heard"
    assert one[core].mean() > 0.9 * none[core].mean(), "and so is the mask"
    np.testing.assert_allclose(five, one, rtol=1e-6)


def test_a_click_outside_of_what_the_objects_cover_says_nothing() -> None:
    image, _ = _nested()
    covered = [ObjectLogits(o.label, (4, 4, 4), o.logits[4:20, 4:22, 4:24]) for o in _guesses()]
    inside, outside = Click((12, 13, 14), True), Click((0, 0, 0), True)

    def told(*clicks: Click) -> list[ObjectLogits]:
        objects = (ObjectPrompts(1, BOX), ObjectPrompts(2, BOX, clicks))
        return list(
            with_intensity_evidence(covered, Case("nested.npz", image, (1.0, 1.0, 1.0), objects))
        )

    for both, one in zip(told(outside, inside), told(inside), strict=True):
        np.testing.assert_array_equal(both.logits, one.logits)
