"""A look: how the window of one object is chosen anew."""

from __future__ import annotations

import torch

from inference.case import Click, ObjectPrompts
from inference.geometry import Window
from inference.look import Look


def test_what_lies_beyond_the_volume_chooses_no_window() -> None:
    volume, window = (40, 60, 60), Window((-20, 0, 0), (44, 64, 64), (32, 32, 32))
    prompts = ObjectPrompts(1, clicks=(Click((5, 30, 30), True),))
    chosen = []
    for beyond in (-1.0, 1.0):
        logits = torch.full((32, 32, 32), -1.0)
        logits[10:14, 12:18, 12:18] = 1  # voxels 0..8
        logits[:10], logits[30:], logits[:, 30:], logits[..., 30:] = (beyond,) * 4
        look = Look(prompts, window, None, logits=logits)
        assert look.rewindow(volume, (1.0, 1.0, 1.0))
        chosen.append(look.window)
    assert chosen[0] == chosen[1] and chosen[0].size < window.size
    empty = Look(prompts, window, None, logits=torch.full((32, 32, 32), -1.0))
    assert empty.logits is not None
    empty.logits[:10] = 1
    assert not empty.rewindow(volume, (1.0, 1.0, 1.0)), "an object beyond the volume is none"
