"""A predictor that does what the clicks say, cheap enough to start once a round.

python -m tests.training.evaluation.obedient INPUTS OUTPUTS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inference.case import Case, load_case


def obedient(case: Case) -> NDArray[np.uint8]:
    """Boxes filled by half at first; later a cube about each click set or cleared."""
    if case.previous is None or not case.previous.any():
        labels = np.zeros(case.image.shape, np.uint8)
        for prompts in case.objects:
            if prompts.box is not None:
                box = zip(prompts.box.start, prompts.box.stop, strict=True)
                labels[tuple(slice(a + (b - a) // 4, b) for a, b in box)] = prompts.label
    else:
        labels = case.previous.copy()
    for prompts in case.objects:
        for click in prompts.clicks:
            cube = tuple(slice(max(p - 3, 0), p + 4) for p in click.position)
            if click.positive:
                labels[cube] = prompts.label
            else:
                labels[cube][labels[cube] == prompts.label] = 0
    return labels


def by_files(inputs: Path, outputs: Path) -> None:
    """The same predictor as a container would be: files in, files out."""
    for path in inputs.iterdir():
        np.savez_compressed(outputs / path.name, segs=obedient(load_case(path)))


if __name__ == "__main__":
    by_files(Path(sys.argv[1]), Path(sys.argv[2]))
