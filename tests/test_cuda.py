"""The GPU's way through the engine: on a GPU where there is one, and everywhere on a pretended one.

Both run the same checks; what only a pretence can stage (full, foreign and broken cards) runs on
that alone.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from inference.case import Box, Case, Click, ObjectPrompts, load_case
from inference.model.refiner import Refiner, RefinerConfig
from inference.model.sam_med3d import SamMed3DConfig, build_sam_med3d
from inference.precision import choose_device
from inference.predict import main as predict
from inference.sam_stage import SamStage
from inference.segmenter import Segmenter
from tests.phantoms import challenge_case, write_npz
from tests.pretend_cuda import PretendCuda, pretend_cuda

SAMPLE = Path(__file__).parent / "data" / "CT_TPTBox_lumbar.npz"
REFINER = RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32, coarse=True)
SAM = SamMed3DConfig(
    image_size=32, embed_dim=24, depth=2, num_heads=2, global_blocks=(1,), prompt_width=48,
    mask_in_chans=4,
)  # fmt: skip


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with pretend_cuda(monkeypatch) as device:
        yield device


@pytest.fixture(params=["pretended", "real"])
def cuda(request: pytest.FixtureRequest) -> None:
    if request.param == "pretended":
        request.getfixturevalue("pretended")
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


def _case(objects: int = 3, boxes: bool = True) -> Case:
    """Bright blocks in a row, the last one too large for one window; one click is a correction."""
    rng = np.random.default_rng(0)
    image = rng.normal(60, 8, (48, 48, 24 * objects + 48))
    prompts = []
    for label in range(1, objects + 1):
        low, high = (18, 14, 24 * label - 18), (30, 28, 24 * label - 6)
        if label == objects:
            high = (44, 44, image.shape[2] - 6)
        image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] += 90
        middle = tuple((a + b) // 2 for a, b in zip(low, high, strict=True))
        clicks = (Click(middle, True), Click((low[0] - 4, low[1], low[2]), False))
        box = Box(low, high, middle[0]) if boxes else None
        prompts.append(ObjectPrompts(label, box, clicks if label % 2 or not boxes else ()))
    return Case("blocks.npz", image.clip(0, 255).astype(np.uint8), (2.0, 1.0, 1.0), tuple(prompts))


def _segmenter(device: str, both: bool = False) -> Segmenter:
    torch.manual_seed(0)
    refiner = Refiner(REFINER)
    sam = SamStage(build_sam_med3d(SAM).eval(), torch.device(device)) if both else None
    return Segmenter(refiner, sam, device)


def _edge(labels: NDArray[np.uint8]) -> int:
    """How many voxels have a neighbour of another label."""
    around = np.ones((3, 3, 3), bool)
    least = ndimage.minimum_filter(labels, footprint=around)
    return int((ndimage.maximum_filter(labels, footprint=around) != least).sum())


def _agree(there: NDArray[np.uint8], here: NDArray[np.uint8]) -> None:
    """At most one voxel in a hundred of those at boundaries may differ."""
    assert here.any()
    assert int((there != here).sum()) <= 0.01 * _edge(here)


@pytest.fixture(scope="module")  # so made before the pretence begins
def drawn_on_the_cpu() -> NDArray[np.uint8]:
    """The sample case with the default weights."""
    return Segmenter.from_files(device="cpu").segment_case(load_case(SAMPLE))


@pytest.mark.usefixtures("cuda")
def test_the_default_weights_draw_as_on_the_cpu(drawn_on_the_cpu: NDArray[np.uint8]) -> None:
    segmenter = Segmenter.from_files(device="auto")
    assert segmenter.device.type == "cuda"
    _agree(segmenter.segment_case(load_case(SAMPLE)), drawn_on_the_cpu)
    assert segmenter.used_device.type == "cuda"


def test_so_they_do_on_a_card_without_bfloat16(
    drawn_on_the_cpu: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_cuda(monkeypatch, half=True):
        there = Segmenter.from_files(device="cuda").segment_case(load_case(SAMPLE))
    _agree(there, drawn_on_the_cpu)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("boxes", [True, False], ids=["boxes", "clicks"])
@pytest.mark.parametrize("both", [False, True], ids=["refiner", "both"])
def test_every_way_through_the_engine_works(boxes: bool, both: bool) -> None:
    case = _case(3 if boxes else 2, boxes)
    here, there = _segmenter("cpu", both), _segmenter("cuda", both)
    _agree(there.segment_case(case), here.segment_case(case))
    again = dataclasses.replace(case, previous=here.segment_case(case))
    _agree(there.segment_case(again), here.segment_case(again))


@pytest.mark.usefixtures("cuda")
def test_sam_med3d_alone() -> None:
    torch.manual_seed(0)
    model = build_sam_med3d(SAM).eval()
    for device in ("cpu", "cuda"):
        labels = Segmenter(None, SamStage(model, torch.device(device)), device).segment_case(
            _case()
        )
        assert labels.any(), device


@pytest.mark.usefixtures("cuda")
def test_the_line_of_a_case_names_the_device(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    write_npz(tmp_path / "in" / "CT_a.npz", challenge_case((12, 24, 20), 2, gts=False))
    assert predict(["--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert " s, cuda" in captured.out and not captured.err


def test_smaller_batches_where_memory_runs_out(pretended: PretendCuda) -> None:
    case, segmenter = _case(), _segmenter("cuda")
    expected = segmenter.segment_case(case)
    assert pretended.largest > 2
    pretended.room, pretended.largest = 2, 0
    _agree(segmenter.segment_case(case), expected)
    assert (pretended.largest, segmenter.used_device.type) == (2, "cuda")


@pytest.mark.parametrize(
    "said", [None, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory"]
)
def test_a_case_too_large_for_the_gpu_is_computed_on_the_cpu(
    pretended: PretendCuda, said: str | None
) -> None:
    case, segmenter = _case(), _segmenter("cuda", both=True)
    expected = _segmenter("cpu", both=True).segment_case(case)
    if said is None:
        pretended.room = 0
    else:
        pretended.fault = RuntimeError(said)
    assert np.array_equal(segmenter.segment_case(case), expected)
    assert (segmenter.device.type, segmenter.used_device.type) == ("cuda", "cpu")

    pretended.room, pretended.fault = 100, None  # the next case fits
    done = pretended.operations
    _agree(segmenter.segment_case(case), expected)
    assert segmenter.used_device.type == "cuda" and pretended.operations > done


def test_other_faults_of_the_gpu_are_no_want_of_memory(pretended: PretendCuda) -> None:
    segmenter = _segmenter("cuda")
    pretended.fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        segmenter.segment_case(_case())


def test_a_gpu_that_others_filled_meanwhile_is_left_to_them(
    pretended: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, segmenter = _case(), _segmenter("cuda")
    to = Refiner.to

    def full(refiner: Refiner, device: torch.device) -> Refiner:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return to(refiner, device)

    monkeypatch.setattr(Refiner, "to", full)
    pretended.room = 0
    expected = segmenter.segment_case(case)
    assert (segmenter.device.type, segmenter.used_device.type) == ("cpu", "cpu")
    assert np.array_equal(segmenter.segment_case(case), expected)  # goes on there


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    ],
    ids=["full", "too old"],
)
def test_a_gpu_that_does_not_compute_is_left_alone(
    pretended: PretendCuda, fault: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_device("auto").type == "cuda"
    pretended.fault = fault
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto") == torch.device("cpu")
    assert str(fault) in caplog.text
    assert choose_device("cuda").type == "cuda"  # who asks for it is told what is wrong


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda: torch finds no CUDA device here; accepted: auto"):
        choose_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_full_gpu_hands_over_to_the_cpu() -> None:
    case, segmenter = _case(), _segmenter("cuda")
    expected = _segmenter("cpu").segment_case(case)
    _agree(segmenter.segment_case(case), expected)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        assert np.array_equal(segmenter.segment_case(case), expected)
        assert segmenter.used_device.type == "cpu"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
