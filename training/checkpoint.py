"""Checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from inference.model.refiner import Refiner
from inference.model.sam_med3d import SamMed3D, build_sam_med3d
from inference.model.weights import NOT_PICKLED, first_line
from training.config import Config

#: Under which name a checkpoint has the network's configuration.
PREFIX = {"refiner": "refiner", "sam_med3d": "sam"}


def build_network(config: Config) -> Refiner | SamMed3D:
    """The configured network with random weights."""
    if config.network == "refiner":
        return Refiner(config.refiner)
    return build_sam_med3d(config.sam)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; it appears under its name only when it is complete and on disk.

    A run has one process that saves: where it is killed meanwhile, the next save takes the place
    of what is left.

    Raises:
        OSError: it cannot be written; the one before is as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # torch's own, after that of a full disk
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} cannot be written: {first_line(reason)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_saved(path: Path, device: torch.device | str = "cpu", mmap: bool = False) -> Any:
    """What ``torch.save`` wrote; nothing in it is executed.

    Args:
        path: of the file.
        device: where its tensors go.
        mmap: leave them in the file until they are used.

    Raises:
        ValueError: the file is damaged, another one, or holds more than tensors and plain values.
        OSError: it cannot be opened.
    """
    try:
        return torch.load(path, weights_only=True, map_location=device, mmap=mmap)
    except NOT_PICKLED as error:
        raise ValueError(f"{path}: not a checkpoint: {first_line(error)}") from None


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of a run, to go on from it.

    Raises:
        ValueError: it is no checkpoint of a run.
    """
    state = read_saved(path, device)
    if not isinstance(state, dict) or not {"model", "average", "step"} <= set(state):
        raise ValueError(f"{path}: no checkpoint of a run; accepted: checkpoint.pt of training")
    return state
