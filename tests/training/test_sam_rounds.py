"""The interaction that SAM-Med3D is trained by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.balls import TINY_SAM, config, write_balls
from training.dataset import WindowDataset
from training.sam_rounds import SamInteraction
from training.volumes import load_folder


class SaysYes(nn.Module):
    """In the network's place: the object is everywhere."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def decode(self, embedding: Tensor, points: object, *_: object) -> tuple[Tensor, Tensor]:
        logits = torch.full((len(embedding), 1, 8, 8, 8), 10.0)
        return logits, torch.ones(len(embedding), 1)


@pytest.mark.parametrize("boxed", [False, True])
def test_what_lies_beyond_the_volume_is_not_asked_for(tmp_path: Path, boxed: bool) -> None:
    settings = config(network="sam_med3d", sam=TINY_SAM, rounds=3, iou=0.0)
    dataset = WindowDataset(load_folder(write_balls(tmp_path)), settings)
    samples = dataset.draw(range(2), 32, boxed)
    for sample in samples:  # as if the volume were the object, but for one place
        sample.target[:] = False
        sample.target[4:20, 5:21, 6:22] = True
        sample.inside[:] = sample.target
        sample.inside[25, 25, 25] = True
    network = SamInteraction(SaysYes(), settings)  # type: ignore[arg-type]
    losses, dice, predicted = network(samples, [(0,), (1,)], set())
    assert torch.equal(predicted, torch.stack([sample.inside for sample in samples]))
    assert dice.min() > 0.999
    assert losses.max() < 0.01
