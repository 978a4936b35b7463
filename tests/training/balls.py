"""A tiny data set for tests of training: volumes with two balls each, and a label map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.checkpoint import build_network
from training.config import Config
from training.dataset import WindowDataset
from training.pool import Pool
from training.refiner_rounds import RefinerRounds
from training.trainer import Trainer
from training.volumes import load_folder


def write_balls(folder: Path) -> Path:
    """Write two CT cases, and ``maps/`` with a label map; returns ``folder``."""
    rng = np.random.default_rng(0)
    grid = np.indices((30, 40, 50)).transpose(1, 2, 3, 0)
    for i in range(2):
        gts = np.zeros((30, 40, 50), np.uint8)
        gts[((grid - [15, 14, 14]) ** 2).sum(-1) < 64] = 1
        gts[((grid - [15, 25, 36]) ** 2).sum(-1) < 100] = 2
        imgs = (gts * 90 + rng.normal(30, 10, gts.shape)).clip(0, 255).astype(np.uint8)
        np.savez(folder / f"CT_balls_{i}.npz", imgs=imgs, gts=gts, spacing=[1.0, 2.0, 3.0])
    (folder / "maps").mkdir()
    np.savez(folder / "maps" / "LM_balls_0.npz", gts=gts, spacing=[1.0, 1.0, 1.0])
    return folder


def config(**values: Any) -> Config:
    """Windows of 16^3 cells on CT, in float32, a refiner of 16 channels."""
    small = {
        "refiner": {"channels": [16, 16], "blocks": [1, 1], "window": 16},
        "windows": [[0.0, 16]],
        "batch": 4,
        "modality_weights": [["CT", 1.0]],
        "precision": "float32",
        "checkpoint_minutes": 60.0,
    }
    return Config.from_dict({**small, **values})


def trainer(folder: Path, out: Path, **values: Any) -> Trainer:
    """Of a new network on the balls, changed as :func:`config` is."""
    settings = config(**values)
    torch.manual_seed(settings.seed)
    volumes = load_folder(folder) + load_folder(folder / "maps")
    out.mkdir(exist_ok=True)
    return Trainer(build_network(settings), WindowDataset(volumes, settings), settings, out)


#: SAM-Med3D of 0.9 M parameters on windows of 32^3.
TINY_SAM = {
    "image_size": 32,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "global_blocks": [1],
    "prompt_width": 48,
}


def pool_of(rounds: RefinerRounds) -> Pool:
    """The objects of rounds without workers."""
    assert isinstance(rounds._objects, Pool)
    return rounds._objects
