"""Rounds by hand, a result shown to the next one: of medical image files, and as the README does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from inference.case import load_case
from inference.nifti import main
from inference.output import save_segmentation
from tests.test_nifti import DIRECTIONS, blobs


@pytest.mark.parametrize("name", ["LPS", "RAS", "oblique sagittal"])
def test_a_result_goes_on_as_the_previous_one(name: str, tmp_path: Path) -> None:
    source, click = blobs(DIRECTIONS[name]), "--click 2 fg 3 1 5"
    image, seg, first, second, segs = (str(tmp_path / n) for n in ("i.nii", "s.nii", *"123"))
    sitk.WriteImage(source, image)
    sitk.WriteImage(source, seg)
    assert main(f"to-npz {image} {first}.npz --labels {seg}".split()) == 0
    with np.load(f"{first}.npz", allow_pickle=True) as arrays:
        result = arrays["gts"]
    save_segmentation(Path(f"{segs}.npz"), result)
    boxes = "--box 1 2 2 6 1 3 --box 3 5 1 2 5 9"
    for prompts in (click, f"{boxes} {click}", "--click 1 fg 2 6 3"):  # class 2 has its mask
        words = f"to-npz {image} {second}.npz {prompts} --previous {segs}.npz"
        assert main(words.split()) == 0
        case = load_case(f"{second}.npz")
        assert case.notes == () and len(case.objects) == 2
        assert case.previous is not None
        np.testing.assert_array_equal(case.previous, result)
