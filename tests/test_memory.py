"""Batches by free memory, what happens when it runs out, and that freed memory is used again.

A GPU's faults: test_cuda.py.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from inference.case import Box, Case, ObjectPrompts
from inference.memory import in_parts, keep_freed_memory, windows_at_once
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


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    ],
)
def test_libraries_say_want_of_memory_in_words_of_their_own(said: str) -> None:
    def run(items: Sequence[int]) -> torch.Tensor:
        if len(items) > 1:
            raise RuntimeError(said)
        return torch.tensor(items)

    assert in_parts(run, [1, 2]).tolist() == [1, 2]


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


def test_want_of_memory_on_the_cpu_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _Tight(room=0).segment_case(_case(1))


_FETCHES = """
import resource, sys, torch
from inference.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for i in range(20):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 << 20) + torch.zeros(16 << 20)  # 64 MB each, and as much for the sum
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_not_fetched_again() -> None:
    def pages(how: str) -> int:
        command = [sys.executable, "-c", _FETCHES, how]
        return int(subprocess.run(command, check=True, capture_output=True).stdout)

    assert pages("kept") < 0.05 * pages("by default")


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    keep_freed_memory()
