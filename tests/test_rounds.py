"""Rounds by hand: a result shown to the next one, and what the README does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from inference.case import Click, load_case
from inference.nifti import main
from inference.output import save_segmentation
from tests.conftest import CHECKOUT
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


def blocks(language: str) -> list[str]:
    """The code blocks of the README's section on rounds, as they stand there."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Your own images, round by round\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_readme_refines_a_nifti_by_a_click(tmp_path: Path) -> None:
    z, y, x = np.indices((70, 180, 200))
    ball = (z - 50) ** 2 * 7 + (y - 127) ** 2 + (x - 150) ** 2 < 900
    image = sitk.GetImageFromArray((300 * ball - 100).astype(np.int16))
    sitk.WriteImage(image, str(tmp_path / "CT.nii.gz"))
    (tmp_path / "predict.sh").symlink_to(CHECKOUT / "predict.sh")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    variables = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(CHECKOUT)}
    first, second = blocks("sh")
    for block in (first, second):
        run = ["sh", "-e", "-c", block]
        subprocess.run(run, cwd=tmp_path, env=variables, check=True, capture_output=True)
        result = sitk.ReadImage(str(tmp_path / "CT_mine.nii.gz"))
        assert result.GetSize() == image.GetSize()
        mask = sitk.GetArrayFromImage(result) == 1
        assert 2 * (mask & ball).sum() > 0.8 * (mask.sum() + ball.sum())
    case = load_case(tmp_path / "my" / "cases" / "CT_mine.npz")
    assert case.notes == () and case.previous is not None
    assert case.objects[0].clicks == (Click((55, 118, 131), True),) and mask[55, 118, 131]


def test_the_readme_refines_the_sample_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    names: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = {}
    exec(*blocks("python"), names)
    first, second = names["first"], names["second"]
    assert first.shape == second.shape == (47, 73, 73)
    assert first[22, 11, 32] != 2 and second[22, 11, 32] == 2
