"""How many windows at once, what is done where memory runs out, and that it is not fetched anew."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_LARGEST_TENSOR = 256 << 20  # bytes; the largest of a window's activations takes 92 MB
_KEPT = 512 << 20  # bytes, free ones at most, about what one window takes at its peak

_MOST_ON_CPU = 8  # more windows at once are no faster there
_MOST_ON_CUDA = 32
#: What a cell of a window takes at the peak, channels and activations of the default refiner
#: together (measured as resident memory on a CPU: 210), rounded up.
_BYTES_PER_CELL = 256
_SHARE = 0.5  # of the free memory; the rest is for fragments and the libraries' workspaces
#: How CUDA, cuBLAS and cuDNN say it where torch's own allocator was not asked.
_SIGNS = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "STATUS_NOT_INITIALIZED")


def windows_at_once(device: torch.device, cells: int) -> int:
    """How many windows of ``cells`` cells each may go through the refiner together.

    On CUDA as many as half of the memory that is free now holds, at least 1 and at most 32;
    elsewhere 8.
    """
    if device.type != "cuda":
        return _MOST_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for itself but does not use is free as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_MOST_ON_CUDA, max(1, int(_SHARE * free) // (_BYTES_PER_CELL * cells)))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: torch's own error, or one of CUDA's libraries that says so."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in _SIGNS)


def in_parts(run: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
    """``run(items)``, or where memory runs out the same in parts of half the size, and so on.

    Args:
        run: items -> (len(items), ...); each item's result must not depend on the others.
        items: at least one.

    Returns:
        (len(items), ...).

    Raises:
        RuntimeError: a single item is too much (:func:`is_out_of_memory`), or another fault.
    """
    size = len(items)
    while True:
        try:
            if size == len(items):
                return run(items)
            return torch.cat([run(items[i : i + size]) for i in range(0, len(items), size)])
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Out here the exception is gone, and with it the tensors its traceback held.
        release_memory()
        size = (size + 1) // 2


def release_memory() -> None:
    """Give back what torch keeps of a GPU's memory without using it."""
    torch.cuda.empty_cache()  # does nothing where CUDA was never used


def keep_freed_memory() -> None:
    """Let the C library keep what tensors give back, for the next ones; up to 512 MB, for good.

    By default glibc returns every large block to the system and fetches it anew, page after page,
    for the next layer: a quarter of a large window's time on two cores. Does nothing where the C
    library is another.
    """
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another library or another system
        return
    tune(_MMAP_THRESHOLD, _LARGEST_TENSOR)
    tune(_TRIM_THRESHOLD, _KEPT)
