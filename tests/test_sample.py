"""The sample case that ships with the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inference.case import load_case
from inference.npz import NpzFile
from inference.object_prompts import stored_box

SAMPLE = Path(__file__).parent / "data" / "CT_TPTBox_lumbar.npz"


def test_the_sample_loads_without_notes() -> None:
    case = load_case(SAMPLE)
    assert case.notes == ()
    assert case.image.shape == (47, 73, 73) and case.image.dtype == np.uint8
    assert case.spacing_mm == (1.5, 1.5, 1.5)
    assert case.previous is None
    assert [prompts.label for prompts in case.objects] == [1, 2, 3]
    assert all(prompts.box is not None and not prompts.clicks for prompts in case.objects)


def test_its_boxes_are_those_of_its_labels() -> None:
    with NpzFile(SAMPLE) as arrays:
        labels, boxes = arrays["gts"], arrays["boxes"]
    assert np.bincount(labels.ravel()).tolist() == [214115, 6567, 17698, 12083]
    assert boxes.tolist() == [stored_box(labels == label) for label in (1, 2, 3)]


def test_bone_is_bright_and_head_is_up() -> None:
    case = load_case(SAMPLE)
    with NpzFile(SAMPLE) as arrays:
        labels = arrays["gts"]
    bone, rest = case.image[labels > 0].mean(), case.image[labels == 0].mean()
    assert bone > rest + 25
    heights = [np.argwhere(labels == label)[:, 0].mean() for label in (1, 2, 3)]  # L2, L3, L4
    assert heights == sorted(heights, reverse=True)


def test_it_is_small() -> None:
    assert SAMPLE.stat().st_size < 2_000_000


def test_real_cases_load_without_notes(shared_data: Path) -> None:
    """And their boxes are ``stored_box`` of their labels, with a padding the rule allows."""
    paths = sorted((shared_data / "val").glob("*.npz"))
    assert paths
    for path in paths:
        case = load_case(path)
        assert case.notes == ()
        with NpzFile(path) as arrays:
            labels, boxes = arrays["gts"], arrays["boxes"]
        assert len(case.objects) == len(boxes) == labels.max()
        paddings = [tuple(int(shift * n / 256) for n in labels.shape[1:]) for shift in range(6)]
        for label, box in enumerate(boxes[:5], start=1):
            mask = labels == label
            assert any(stored_box(mask, (y, x)) == box for y, x in paddings), (path.name, label)
