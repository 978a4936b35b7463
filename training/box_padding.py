"""How far the challenge's boxes are padded at random."""

from __future__ import annotations

import numpy as np

_MOST_SHIFT = 5  # voxels of an image 256 wide


def box_padding(rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    """Voxels added to both sides of one object's box, in y and in x.

    The organisers' rule (``stored_box`` of inference/object_prompts.py): one shift an object, in
    proportion to the image, rounded down. Whoever adds them stays within the image.
    """
    shift = int(rng.integers(_MOST_SHIFT + 1))
    return shift * height // 256, shift * width // 256
