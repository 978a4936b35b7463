"""What an object's logits say: probabilities, and the Dice to be expected."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


def probability(logits: Logits) -> NDArray[np.float32]:
    """The logistic function, any shape; SciPy's would cost each start 0.2 s of imports."""
    negative = np.negative(logits).clip(-30, 30)
    return np.asarray(1 / (1 + np.exp(negative)), np.float32)


def expected_dice(logits: Logits) -> float:
    """The Dice the network expects of its mask, 0..1: soft Dice of probabilities and mask."""
    chances = probability(logits)
    mask = logits > 0
    total = float(chances.sum(dtype=np.float64)) + np.count_nonzero(mask)
    return 2 * float(chances[mask].sum(dtype=np.float64)) / total if total else 0.0
