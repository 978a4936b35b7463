"""Batches by free memory, and what happens when it runs out; faults are staged on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from inference.case import Box, Case, ObjectPrompts
from inference.memory import in_parts, windows_at_once
from inference.model.refiner import Refiner, RefinerConfig
from inference.segmenter import Segmenter

CUDA = torch.device("cuda")


def _case(objects: int = 5) -> Case:
    rng = np.random.default_rng(0)
    image = rng.normal(60, 8, (24, 32, 24 * objects))
    prompts = []
    for label in range(1, objects + 1):
        low, high = (6, 8, 24 * label - 18), (18, 22, 24 * label - 6)
        image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] += 90
        prompts.append(ObjectPrompts(label, Box(low, high, 12)))
    return Case("blocks.npz", image.clip(0, 255).astype(np.uint8), (1.0, 1.0, 1.0), tuple(prompts))


class _Tight(Segmenter):
    """A segmenter on a device with room for ``room`` windows, which counts what is asked of it."""

    def __init__(self, room: int) -> None:
        torch.manual_seed(0)
        super().__init__(Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)))
        self.room = room
        self.asked: list[int] = []

    def _network(self, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(channels))
        if len(channels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super()._network(refiner, channels)


class _OnTightGpu(_Tight):
    """As if on a GPU: memory runs out there, not on the CPU. Everything is computed on the CPU."""

    def __init__(self, room: int, faults_on_return: int = 0) -> None:
        super().__init__(room)
        self.device = self.used_device = CUDA
        self.moves: list[str] = []
        self.faults_on_return = faults_on_return

    def _move(self, device: torch.device) -> None:
        self.moves.append(device.type)
        if device.type == "cuda" and self.faults_on_return:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.device = device
        self.room = 0 if device.type == "cuda" else 100


@pytest.fixture
def gpu_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for CUDA gets the CPU."""
    import inference.segmenter as module

    to_tensor, autocast = module.to_tensor, module.autocast
    monkeypatch.setattr(module, "to_tensor", lambda voxels, device: to_tensor(voxels))
    monkeypatch.setattr(module, "autocast", lambda device: autocast(torch.device("cpu")))
    monkeypatch.setattr(module, "windows_at_once", lambda device, cells: 8)


def _with_room(room: int) -> tuple[list[int], list[int]]:
    """Results and sizes of calls for ten items where ``room`` fit."""
    calls = []

    def run(items: Sequence[int]) -> torch.Tensor:
        calls.append(len(items))
        if len(items) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.tensor(items) ** 2

    return in_parts(run, range(10)).tolist(), calls


@pytest.mark.parametrize(
    ("room", "sizes"),
    [(10, [10]), (9, [10, 5, 5]), (3, [10, 5, 3, 3, 3, 1]), (1, [10, 5, 3, 2] + 10 * [1])],
)
def test_parts_are_halved_until_they_fit(room: int, sizes: list[int]) -> None:
    squares, calls = _with_room(room)
    assert squares == [i * i for i in range(10)]
    assert calls == sizes


def test_one_item_too_many_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _with_room(0)


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    def run(items: Sequence[int]) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel image"):
        in_parts(run, [1, 2])


@pytest.mark.parametrize(
    ("free_gib", "reserved_gib", "edge", "expected"),
    [(40, 0, 64, 32), (1, 0, 64, 8), (0, 1, 64, 8), (1, 0, 128, 1), (0.01, 0, 128, 1)],
)
def test_free_memory_says_how_many(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, reserved_gib: float, edge: int, expected: int
) -> None:
    gib = 2**30
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (int(free_gib * gib), 48 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: (reserved_gib + 2) * gib)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 2 * gib)
    assert windows_at_once(CUDA, edge**3) == expected


def test_smaller_batches_give_the_same_result() -> None:
    case = _case()
    whole, tight = _Tight(room=100), _Tight(room=2)
    expected = whole.segment_case(case)
    assert set(np.unique(expected)) == set(range(6))
    result = tight.segment_case(case)
    assert max(whole.asked) == 5 and 2 in tight.asked
    # Sums in another order may turn a voxel on an edge.
    assert (result != expected).sum() <= 0.01 * (expected > 0).sum()


@pytest.mark.usefixtures("gpu_on_cpu")
def test_a_case_too_large_for_the_gpu_is_computed_on_the_cpu() -> None:
    case = _case()
    expected = _Tight(room=100).segment_case(case)
    segmenter = _OnTightGpu(room=0)
    assert np.array_equal(segmenter.segment_case(case), expected)
    assert segmenter.moves == ["cpu", "cuda"]
    assert (segmenter.device.type, segmenter.used_device.type) == ("cuda", "cpu")

    segmenter.room = 100  # the next case fits
    assert np.array_equal(segmenter.segment_case(case), expected)
    assert (segmenter.device.type, segmenter.used_device.type) == ("cuda", "cuda")


@pytest.mark.usefixtures("gpu_on_cpu")
def test_a_gpu_that_others_filled_meanwhile_is_left_to_them() -> None:
    case = _case()
    segmenter = _OnTightGpu(room=0, faults_on_return=1)
    assert segmenter.segment_case(case).any()
    assert segmenter.moves == ["cpu", "cuda", "cpu"]
    assert segmenter.device.type == "cpu"
    assert segmenter.segment_case(case).any()  # goes on there


def test_want_of_memory_on_the_cpu_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _Tight(room=0).segment_case(_case(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_agrees_with_the_cpu() -> None:
    case = _case()
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        refiner = Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32))
        results.append(Segmenter(refiner, device=device).segment_case(case))
    on_cpu, on_cuda = results
    assert (on_cuda != on_cpu).sum() <= 0.01 * (on_cpu > 0).sum()
