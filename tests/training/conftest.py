"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.test_nifti import DIRECTIONS, blobs
from tests.training.balls import write_balls
from tests.training.raw_images import scan, write


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in a fixed order, in this process as in others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two volumes with two balls each, and a label map in ``maps``."""
    return write_balls(tmp_path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Images, labels, out: one case ``a`` that lies oblique."""
    images, labels, out = (tmp_path / name for name in ("images", "labels", "out"))
    seg = blobs(DIRECTIONS["oblique sagittal"])
    write(images / "a.nii.gz", scan(seg))
    write(labels / "a.nii.gz", seg)
    return images, labels, out
