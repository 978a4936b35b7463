"""The challenge's six rounds through `docker run`, with the scores of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inference.finishing import Finisher
from inference.segmenter import Segmenter
from tests.container.conftest import inside
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.predictors import Image, InProcess
from training.evaluation.protocol import official_row, run_case


@pytest.fixture
def threads_of_the_image(image: str) -> Iterator[None]:
    """As many threads here as there: sums are then added up in the same order."""
    before = torch.get_num_threads()
    (threads,) = inside(image, "python -c 'import torch; print(torch.get_num_threads())'")
    torch.set_num_threads(int(threads))
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_of_the_image")
@pytest.mark.parametrize(
    ("name", "boxes"),
    [
        ("US_deepreg_prostate_case000022", False),
        pytest.param("PET_IBSI-STS_STS_033", True, marks=pytest.mark.slow),
        pytest.param("CT_OpenKBP_pt222", True, marks=pytest.mark.slow),  # seven organs
    ],
)
def test_the_image_scores_as_this_process_does(
    image: str, shared_data: Path, name: str, boxes: bool
) -> None:
    case = load_labelled_case(shared_data / "val" / f"{name}.npz", boxes=boxes)
    segmenter = Segmenter.from_files(device="cpu")
    finish = Finisher()
    here, labels_here = run_case(case, InProcess(lambda case: segmenter.segment_case(case, finish)))
    there, labels_there = run_case(case, Image(image, gpu=False))
    assert all(held is None or held.error is None for held in there.rounds)
    assert there.clicks == here.clicks
    rows = [official_row(here), official_row(there)]
    assert rows[0]["DSC_Final"] > 0.5
    for column, value in rows[0].items():
        if "RunningTime" not in column:
            assert rows[1][column] == value, column
    assert (labels_there == labels_here).all()
    assert rows[1]["TotalRunningTime"] < rows[1]["runtime_upperbound"]
