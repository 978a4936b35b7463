"""From logits to the label map: the paper's way, by rules, by probability and by label."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import policy
from inference.case import Case, Click, ObjectPrompts
from inference.finishing import POSTPROCESSING, Finisher
from inference.refinement import ObjectLogits, honour_clicks, merge
from tests import literal_postprocessing as literal
from tests.test_postprocessing import blobs, speckled


def case_of(shape, clicks=(), count=3) -> Case:
    objects = tuple(
        ObjectPrompts(label, None, tuple(clicks[label - 1]) if clicks else ())
        for label in range(1, count + 1)
    )
    return Case("CT_x.npz", np.zeros(shape, np.uint8), (2.0, 1.0, 1.0), objects)


@st.composite
def overlapping_objects(draw) -> tuple[tuple[int, int, int], list[ObjectLogits]]:
    """Three objects, each with logits over a cut-out of its own, claiming many voxels at once."""
    shape = draw(st.tuples(*[st.integers(2, 18)] * 3))
    results = []
    for label in (1, 2, 3):
        seed = draw(st.integers(0, 2**16))
        random = np.random.default_rng(seed)
        start = tuple(draw(st.integers(0, n - 1)) for n in shape)
        size = tuple(draw(st.integers(1, n - a)) for a, n in zip(start, shape, strict=True))
        mask = speckled(blobs(size, 1, seed), 0.1, seed + 1) > 0
        sizes = random.uniform(0.1, 5, size).astype(np.float32)
        results.append(ObjectLogits(label, start, np.where(mask, sizes, -sizes)))
    return shape, results


@settings(max_examples=150)
@given(overlapping_objects())
def test_the_papers_way_equals_scipy_on_each_objects_own_mask(scene):
    shape, results = scene
    expected = np.zeros(shape, np.uint8)
    for result in reversed(results):  # so that lower labels come last and win
        mask = np.zeros(shape, bool)
        mask[result.place] = result.logits > 0
        expected[literal.clean_object(mask)] = result.label
    assert np.array_equal(Finisher("paper")(results, case_of(shape)), expected)


@settings(max_examples=100)
@given(overlapping_objects(), st.data())
def test_whoever_wins_has_the_mask_and_clicks_have_their_way(scene, data):
    shape, results = scene
    spots = st.tuples(*[st.integers(0, n - 1) for n in shape])
    places = data.draw(st.lists(spots, min_size=3, max_size=3, unique=True))
    clicks = [(Click(place, True),) for place in places]
    results = [honour_clicks(r, clicks[r.label - 1]) for r in results]
    case = case_of(shape, clicks)
    by_label = Finisher("off", label_priority=True)(results, case)
    by_probability = Finisher("off")(results, case)
    assert np.array_equal(by_probability, merge(results, shape))
    claims = np.zeros((4, *shape), bool)
    for result in results:
        claims[result.label][result.place] = result.logits > 0
    assert np.array_equal(by_label > 0, claims.any(0)), "somebody gets every claimed voxel"
    lowest = np.where(claims.any(0), claims[1:].argmax(0) + 1, 0)
    clicked = np.zeros(shape, bool)
    for label, place in enumerate(places, 1):
        assert by_label[place] == label
        assert by_probability[place] == label
        clicked[place] = True
    assert np.array_equal(by_label[~clicked], lowest[~clicked])


def test_of_equal_logits_the_lower_label_wins():
    same = [ObjectLogits(label, (0, 0, 0), np.ones((2, 2, 2), np.float32)) for label in (1, 2)]
    assert (Finisher("off")(same, case_of((2, 2, 2))) == 1).all()


def test_rules_reach_the_label_map(monkeypatch, tmp_path):
    table = tmp_path / "policy.toml"
    table.write_text('format = 1\n[[rule]]\nstep = "islands"\namount = 0.5\n', encoding="utf-8")
    monkeypatch.setattr(policy, "POLICY_FILE", table)
    logits = np.full((9, 9, 9), -1, np.float32)
    logits[1:5, 1:5, 1:5] = 1
    logits[7, 7, 7] = 1
    result = ObjectLogits(1, (0, 0, 0), logits)
    case = case_of((9, 9, 9), [[Click((2, 2, 2), True)]], 1)
    assert np.count_nonzero(Finisher("off")([result], case)) == 65
    assert np.count_nonzero(Finisher("auto")([result], case)) == 64


def test_probabilities_are_those_before_post_processing_and_of_the_last_case():
    logits = np.full((3, 4, 5), -1, np.float32)
    logits[1, 1, 1] = 2
    finisher = Finisher("paper", save_probabilities=True)
    assert finisher.probabilities is None
    finisher([ObjectLogits(2, (1, 0, 0), logits)], case_of((8, 4, 5)))
    label_map = finisher([ObjectLogits(1, (2, 0, 0), logits)], case_of((8, 4, 5)))
    assert not label_map.any()
    arrays = finisher.probabilities.arrays()
    assert sorted(arrays) == ["outline_1", "probability_1", "regions"]
    assert arrays["regions"].tolist() == [[1, 2, 0, 0, 5, 4, 5]]
    assert arrays["probability_1"][1, 1, 1] == round(255 / (1 + np.exp(-2)))
    assert np.argwhere(arrays["outline_1"]).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("kind", POSTPROCESSING)
@pytest.mark.parametrize("size", [(0, 0, 0), (4, 5, 6)])
def test_an_object_of_which_nothing_was_found_takes_nothing(kind, size):
    logits = [np.full(size, -1, np.float32), np.full((8, 8, 8), 3, np.float32)]
    results = [ObjectLogits(i, (0, 0, 0), each) for i, each in enumerate(logits, 1)]
    finisher = Finisher(kind, label_priority=True, save_probabilities=True)
    label_map = finisher(results, case_of((8, 8, 8), count=2))
    assert (label_map == 2).all()
    arrays = finisher.probabilities.arrays()
    assert arrays["regions"].tolist() == [[1, 0, 0, 0, *size], [2, 0, 0, 0, 8, 8, 8]]
    assert arrays["outline_1"].shape == size


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"'best'.*off, paper, auto"):
        Finisher("best")
