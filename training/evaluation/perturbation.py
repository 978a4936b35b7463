"""Prompts as a sloppy user gives them: boxes off by some per cent, clicks by some voxels."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.object_prompts import BOX_KEYS
from training.evaluation.metrics import CLICK_ROUNDS

_EDGES = tuple(zip(BOX_KEYS[::2], BOX_KEYS[1::2], strict=True))  # z, y, x


class BoxesError(ValueError):
    """Boxes that no user could have drawn; the message says which."""


@dataclass(frozen=True)
class PromptVariant:
    """How prompts differ from the challenge's.

    Attributes:
        name: as on the command line.
        box_jitter: each face of a box moves by up to this fraction of the box's edge, uniformly.
        click_shift: each click moves by up to this many voxels along each axis, uniformly.
        with_boxes: False: no box is given.
        click_rounds: rounds in which clicks are given; later ones keep the last result.
    """

    name: str
    box_jitter: float = 0.0
    click_shift: int = 0
    with_boxes: bool = True
    click_rounds: int = CLICK_ROUNDS

    def generator(self, case_name: str) -> np.random.Generator:
        """Random numbers that depend on the case alone: variants of one strength are paired."""
        return np.random.default_rng(zlib.crc32(case_name.encode()))

    def boxes(
        self, boxes: NDArray[Any], shape: Sequence[int], random: np.random.Generator
    ) -> NDArray[Any] | None:
        """The boxes a user draws, (N,) objects; a jittered box keeps a voxel and its middle.

        Raises:
            BoxesError: one cannot be moved, as it is no box.
        """
        if not self.with_boxes:
            return None
        if not self.box_jitter:
            return boxes
        drawn = np.empty(len(boxes), object)
        for index, box in enumerate(boxes):
            try:
                drawn[index] = self._jittered(box, shape, random)
            except (LookupError, TypeError, ValueError, ArithmeticError):
                keys = ", ".join(("z_mid", *BOX_KEYS))
                raise BoxesError(
                    f"box {index + 1}: received {str(box)[:100]}; accepted: integers {keys}"
                ) from None
        return drawn

    def _jittered(
        self, box: Any, shape: Sequence[int], random: np.random.Generator
    ) -> dict[str, Any]:
        moved = dict(box)
        for axis, (low, high) in enumerate(_EDGES):
            faces = np.array([box[low], box[high]], int)
            reach = self.box_jitter * (faces[1] - faces[0] + 1)
            ends = np.rint(faces + reach * random.uniform(-1, 1, 2))
            ends = ends.clip(0, shape[axis] - 1).astype(int)
            moved[low], moved[high] = int(ends.min()), int(ends.max())
        moved["z_mid"] = int(np.clip(box["z_mid"], moved["z_min"], moved["z_max"]))
        return moved

    def move(
        self, position: Sequence[int], shape: Sequence[int], random: np.random.Generator
    ) -> tuple[int, ...]:
        """Where the user's click lands instead of ``position``, inside the volume."""
        if not self.click_shift:
            return tuple(position)
        shift = random.integers(-self.click_shift, self.click_shift, 3, endpoint=True)
        moved = np.clip(np.asarray(position) + shift, 0, np.asarray(shape) - 1)
        return tuple(int(c) for c in moved)


EXACT = PromptVariant("exact")
VARIANTS = {
    variant.name: variant
    for variant in (
        EXACT,
        *(PromptVariant(f"box-jitter-{p}", box_jitter=p / 100) for p in (5, 10, 20)),
        *(PromptVariant(f"click-shift-{v}", click_shift=v) for v in (1, 2, 3, 4, 5)),
        PromptVariant("no-box", with_boxes=False),
        PromptVariant("one-click", click_rounds=1),
        PromptVariant("no-box-one-click", with_boxes=False, click_rounds=1),
    )
}
