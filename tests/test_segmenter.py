"""The whole way of a case through the segmenter, with a small untrained refiner.

That returns the likelihood map, which finds the phantoms' objects well enough for this.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.case import Box, Case, Click, ObjectPrompts
from inference.consensus import consensus
from inference.model.refiner import CHANNELS, Refiner, RefinerConfig
from inference.model.weights import save_weights
from inference.refinement import FIRST_LOOKS, merge
from inference.segmenter import Segmenter

SPACING_MM = (3.0, 2.0, 1.0)


def _segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)))


def _phantom(
    shape: tuple[int, int, int] = (20, 40, 60),
) -> tuple[np.ndarray, np.ndarray, list[Box]]:
    """Two bright balls (in millimetres) of different grey on a noisy background."""
    rng = np.random.default_rng(0)
    grid = np.indices(shape).transpose(1, 2, 3, 0) * np.array(SPACING_MM)
    truth = np.zeros(shape, np.uint8)
    for label, (centre, radius) in enumerate([((30, 40, 15), 11), ((25, 30, 42), 9)], start=1):
        truth[((grid - np.array(centre)) ** 2).sum(-1) < radius**2] = label
    image = np.array([40, 180, 120])[truth] + rng.normal(0, 8, shape)
    boxes = []
    for label in (1, 2):
        where = np.argwhere(truth == label)
        low, high = where.min(0), where.max(0) + 1
        boxes.append(Box(tuple(low), tuple(high), int((low[0] + high[0]) // 2)))
    return image.clip(0, 255).astype(np.uint8), truth, boxes


def _case(
    boxes: bool = True, clicks: tuple[tuple[Click, ...], ...] = ((), ()), **more: object
) -> Case:
    image, _, found = _phantom()
    objects = tuple(ObjectPrompts(i + 1, found[i] if boxes else None, clicks[i]) for i in range(2))
    return Case("phantom.npz", image, SPACING_MM, objects, **more)  # type: ignore[arg-type]


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def test_boxes_find_their_objects() -> None:
    _, truth, _ = _phantom()
    labels = _segmenter().segment_case(_case())
    assert labels.shape == truth.shape and labels.dtype == np.uint8
    for label in (1, 2):
        assert _dice(labels == label, truth == label) > 0.85


def test_an_object_that_nothing_is_said_about_keeps_its_mask() -> None:
    image, truth, boxes = _phantom()
    for said, changed in ((ObjectPrompts(1, boxes[0]), True), (ObjectPrompts(1), False)):
        previous = np.where(truth == 2, 2, truth * (not changed)).astype(np.uint8)
        objects = (said, ObjectPrompts(2), ObjectPrompts(3))
        labels = _segmenter().segment_case(
            Case("phantom.npz", image, SPACING_MM, objects, previous=previous)
        )
        assert np.array_equal(labels == 2, truth == 2)
        assert _dice(labels == 1, truth == 1) > (0.85 if changed else 0.999)


def test_clicks_alone_find_their_objects() -> None:
    """With the weights that ship: untrained, nothing tells an object's size."""
    _, truth, _ = _phantom()
    clicks = tuple(
        (Click(tuple(int(v) for v in np.argwhere(truth == k).mean(0).round()), True),)
        for k in (1, 2)
    )
    labels = Segmenter.from_files(device="cpu").segment_case(_case(boxes=False, clicks=clicks))
    for label in (1, 2):
        assert _dice(labels == label, truth == label) > 0.6


def test_a_first_look_counts_beside_the_closer_one_chosen_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here it holds a mask of 8 x 8 x 8 cells, and the closer one sees nothing."""

    def network(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(channels[:, 0], -8.0)
        for i, one in enumerate(logits):
            calls.append(i)
            if len(calls) <= len(FIRST_LOOKS):
                z, y, x = (n // 2 for n in one.shape)
                one[z - 4 : z + 4, y - 4 : y + 4, x - 4 : x + 4] = 4.0
        return logits

    weights: list[list[float]] = []
    calls: list[int] = []
    join = consensus

    def recorded(looks: Any, given: Any) -> Any:
        weights.append(list(given))
        return join(looks, given)

    monkeypatch.setattr(Segmenter, "_network", network)
    monkeypatch.setattr("inference.segmenter.consensus", recorded)
    case = _case(boxes=False, clicks=((Click((10, 20, 15), True),), ()))
    labels = _segmenter().segment_case(case)
    assert weights == [[2, 2, 1, 1]]
    assert (labels == 1).sum() > 20, "a third of the probability: more doubt, more voxels"


def test_the_axis_of_the_image_does_not_matter() -> None:
    """The same case with its axes turned gives the same masks: no axis is taken for another."""
    case = _case()
    labels = _segmenter().segment_case(case)
    turn = (2, 0, 1)

    def turned(triple: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(triple[a] for a in turn)

    # Without the middle-slice hint, which is tied to z.
    objects = tuple(
        ObjectPrompts(
            o.label, Box(turned(o.box.start), turned(o.box.stop), turned((o.box.middle, 0, 0))[0])
        )  # type: ignore[union-attr,arg-type]
        for o in case.objects
    )
    other = dataclasses.replace(
        case,
        image=np.ascontiguousarray(case.image.transpose(turn)),
        spacing_mm=turned(SPACING_MM),  # type: ignore[arg-type]
        objects=objects,
    )
    again = _segmenter().segment_case(other)
    assert _dice(again > 0, labels.transpose(turn) > 0) > 0.97


def test_an_object_without_prompts_stays_empty() -> None:
    case = _case()
    objects = (ObjectPrompts(1), case.objects[1])
    labels = _segmenter().segment_case(dataclasses.replace(case, objects=objects))
    assert set(np.unique(labels)) == {0, 2}


def test_all_objects_without_prompts_give_an_empty_map() -> None:
    case = dataclasses.replace(_case(), objects=(ObjectPrompts(1), ObjectPrompts(2)))
    assert not _segmenter().segment_case(case).any()


def test_a_click_reaches_the_network_and_a_mask_can_shrink_as_well_as_grow() -> None:
    """With the weights that ship: it is training that makes a click count for more than a voxel."""
    segmenter = Segmenter.from_files(device="cpu")
    first = segmenter.segment_case(_case())
    inside = tuple(int(v) for v in np.argwhere(first == 1).mean(0).round())
    less = segmenter.segment_case(_case(clicks=((Click(inside, False),), ()), previous=first))
    assert (first == 1).sum() - (less == 1).sum() > 1, "a whole region goes, not one voxel"
    outside = (inside[0] + 5, inside[1], inside[2])
    assert first[outside] == 0
    more = segmenter.segment_case(_case(clicks=((Click(outside, True),), ()), previous=first))
    assert ((more == 1) & (first != 1)).sum() > 1, "a whole region comes, not one voxel"


def test_the_same_case_gives_the_same_bytes() -> None:
    assert np.array_equal(_segmenter().segment_case(_case()), _segmenter().segment_case(_case()))


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.builds(Click, st.tuples(*[st.integers(0, n - 1) for n in (20, 40, 60)]), st.booleans()),
        min_size=1,
        max_size=4,
        unique_by=lambda c: c.position,
    ),
    st.booleans(),
)
def test_clicks_have_their_way_in_the_result(clicks: list[Click], boxes: bool) -> None:
    labels = _segmenter().segment_case(_case(boxes=boxes, clicks=(tuple(clicks), ())))
    for click in clicks:
        assert (labels[click.position] == 1) == click.positive


def test_a_click_of_one_object_changes_nothing_outside_its_window() -> None:
    segmenter = _segmenter()
    maps = []
    for clicks in ((), (Click((10, 20, 15), False),)):
        case = _case(clicks=(clicks, ()))
        segmenter.set_image(case.image, case.spacing_mm)
        # Not by segment_case: at its end all objects are looked at together.
        maps.append(merge(segmenter.segment(case.objects), case.image.shape))
    before, after = maps
    far = np.ones(before.shape, bool)
    far[:, :, :36] = False  # object 1 and its window lie below x = 36
    np.testing.assert_array_equal(after[far], before[far])


@pytest.mark.parametrize("shape", [(1, 40, 60), (20, 1, 60), (33, 17, 1)])
def test_volumes_of_one_voxel_an_axis(shape: tuple[int, int, int]) -> None:
    image = np.full(shape, 20, np.uint8)
    middle = tuple(n // 2 for n in shape)
    box = Box(
        tuple(max(0, m - 4) for m in middle),
        tuple(min(n, m + 5) for m, n in zip(middle, shape, strict=True)),
        middle[0],
    )  # type: ignore[arg-type]
    case = Case("thin.npz", image, SPACING_MM, (ObjectPrompts(1, box, (Click(middle, True),)),))  # type: ignore[arg-type]
    labels = _segmenter().segment_case(case)
    assert labels.shape == shape and labels[middle] == 1


def test_a_click_on_one_object_speaks_against_the_other() -> None:
    """With the weights that ship; two objects of one grey, told apart by the click alone."""
    image = np.full((40, 40, 60), 30, np.uint8)
    image[12:28, 12:28, 12:48] = 200
    first = ObjectPrompts(1, Box((12, 12, 12), (28, 28, 30), 20))
    second = ObjectPrompts(2, Box((12, 12, 22), (28, 28, 48), 20), (Click((20, 20, 26), True),))
    segmenter = Segmenter.from_files(device="cpu")
    segmenter.set_image(image, (1.0, 1.0, 1.0))
    near, means = np.s_[18:23, 18:23, 25:28], []
    for objects in ([first], [first, second]):
        result = next(segmenter.segment(objects))
        logits = np.full(image.shape, -10, np.float32)
        logits[result.place] = result.logits
        means.append(logits[near].mean())
    assert means[0] > 0 and means[1] < means[0] - 1, means


def test_objects_without_a_box_ask_their_own_refiner() -> None:
    """Side by side in one case, in windows of another size; each as if it were the only one."""
    clicks = ((Click((10, 20, 15), True),), (Click((8, 15, 42), True),))
    mixed = _case(clicks=clicks)
    boxed, unboxed = mixed.objects[0], dataclasses.replace(mixed.objects[1], box=None)
    torch.manual_seed(0)
    small = Refiner(RefinerConfig(channels=(8, 8), blocks=(2, 1), window=24))
    with torch.no_grad():
        small.base.mul_(0.5)
    large = _segmenter()._refiner
    assert large is not None

    def found(segmenter: Segmenter) -> list[np.ndarray]:
        segmenter.set_image(mixed.image, mixed.spacing_mm)
        return [result.logits for result in segmenter.segment([boxed, unboxed])]

    alone = found(Segmenter(large)), found(Segmenter(small))
    both = found(Segmenter(large, unboxed=small))
    for i in range(2):
        np.testing.assert_allclose(both[i], alone[i][i], atol=1e-3)
        assert alone[0][i].shape != alone[1][i].shape or not np.allclose(alone[0][i], alone[1][i])


def test_once_its_size_is_known_an_object_asks_both_refiners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the fourth click on the other one is shown the box of the last mask."""
    large = _segmenter()._refiner
    small = Refiner(RefinerConfig(channels=(8, 8), blocks=(2, 1), window=32))
    asked: list[tuple[bool, float]] = []
    run = Segmenter._network

    def recorded(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        asked.append((refiner is small, float(channels[:, CHANNELS.index("box")].max())))
        return run(self, refiner, channels) * 0 + (1 if refiner is small else -3)

    monkeypatch.setattr(Segmenter, "_network", recorded)
    clicks = tuple(Click((10, 20, 12 + i), True) for i in range(4))
    for n, both in ((3, False), (4, True)):
        case = _case(boxes=False, clicks=(clicks[:n], ()), previous=_phantom()[1])
        segmenter = Segmenter(large, unboxed=small)
        segmenter.set_image(case.image, case.spacing_mm)
        asked.clear()
        result, _ = segmenter.segment(case.objects, case.previous)
        assert (True, 0.0) in asked and any(not unboxed for unboxed, _ in asked) == both
        assert all(box > 0 for unboxed, box in asked if not unboxed)
        assert (result.logits.size == n) == both, "the mean is below zero but at the clicks"


def test_a_bundle_brings_the_refiner_of_objects_without_a_box(tmp_path: Path) -> None:
    networks = {
        "refiner": Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)),
        "unboxed": Refiner(RefinerConfig(channels=(8, 8), blocks=(2, 1), window=32)),
    }

    def split(part: str) -> dict[str, torch.Tensor]:
        return {f"{part}.{n}": t for n, t in networks[part].state_dict().items()}

    path = tmp_path / "both.safetensors"
    save_weights(
        path,
        split("refiner") | split("unboxed"),
        {k: one.config.to_json() for k, one in networks.items()},
    )
    loaded = Segmenter.from_files(path, device="cpu")
    assert [one.config for one in loaded._refiners] == [one.config for one in networks.values()]
    save_weights(path, split("refiner"), {"refiner": networks["refiner"].config.to_json()})
    assert len(Segmenter.from_files(path, device="cpu")._refiners) == 1, "one for all"


@pytest.mark.parametrize("boxes", [True, False])
def test_objects_know_of_each_others_boxes_and_clicks(
    boxes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a box before there are clicks; without boxes of clicks."""
    known = []
    run = Segmenter._network

    def recorded(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        known.append(float(channels[0, CHANNELS.index("others")].max()))
        return run(self, refiner, channels)

    monkeypatch.setattr(Segmenter, "_network", recorded)
    clicks = ((Click((10, 20, 15), True),), (Click((8, 15, 40), True),))
    case = _case() if boxes else _case(boxes=False, clicks=clicks)
    one, other = case.objects
    if boxes:
        other = dataclasses.replace(one, label=2)  # about the same place
    segmenter = _segmenter()
    segmenter.set_image(case.image, case.spacing_mm)
    list(segmenter.segment([one]))
    assert not any(known)
    next(segmenter.segment([one, other]))
    assert known[-1] == pytest.approx(0.5 if boxes else 1, abs=0.1)


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="call set_image first"):
        next(_segmenter().segment([ObjectPrompts(1)]))
