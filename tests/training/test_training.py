"""Episodes show the right object, a short run learns and resumes, bad settings are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from inference.model.refiner import Refiner, RefinerConfig
from inference.prompts import refiner_channels
from training.config import Config
from training.dataset import EpisodeSampler, LabelledVolume, load_folder
from training.losses import dice_ce
from training.trainer import Trainer

SMALL = RefinerConfig(channels=(8, 8), blocks=(1, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two CT volumes with two balls each, and a label map."""
    rng = np.random.default_rng(0)
    grid = np.indices((30, 40, 50)).transpose(1, 2, 3, 0)
    for i in range(2):
        gts = np.zeros((30, 40, 50), np.uint8)
        gts[((grid - [15, 14, 14]) ** 2).sum(-1) < 64] = 1
        gts[((grid - [15, 25, 36]) ** 2).sum(-1) < 100] = 2
        imgs = (gts * 90 + rng.normal(30, 10, gts.shape)).clip(0, 255).astype(np.uint8)
        np.savez(tmp_path / f"CT_balls_{i}.npz", imgs=imgs, gts=gts, spacing=[1.0, 2.0, 3.0])
    (tmp_path / "maps").mkdir()
    np.savez(tmp_path / "maps" / "LM_balls_0.npz", gts=gts, spacing=[1.0, 1.0, 1.0])
    return tmp_path


def _config(**values: object) -> Config:
    return Config.from_dict(
        {"windows": [[0.0, 16]], "batch": 4, "modality_weights": [["CT", 1.0]], **values}
    )


def test_volumes_are_read_with_spacing_in_our_order(folder: Path) -> None:
    volume = load_folder(folder)[0]
    assert volume.spacing_mm == (3.0, 2.0, 1.0)
    assert (volume.modality, volume.source) == ("CT", "CT_balls")
    assert [label for label, _, _ in volume.objects] == [1, 2]


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accepted: npz files with gts"):
        load_folder(tmp_path)


@pytest.mark.parametrize("no_box", [0.0, 1.0])
def test_an_episodes_prompts_fit_its_target(folder: Path, no_box: float) -> None:
    config = _config(no_box=no_box, synthetic=0.0, zoom=0.0)
    sampler = EpisodeSampler(load_folder(folder), [], config, np.random.default_rng(0))
    for _ in range(40):
        episode = sampler.draw(16)
        target = episode.target.bool()
        assert target.any() and episode.image.shape == (16, 16, 16)
        where = target.nonzero().float()
        if no_box:
            ((position, positive),) = episode.prompts.clicks
            assert episode.prompts.box is None and positive
            assert target[tuple(int(v) for v in position)]
        else:
            assert episode.prompts.box is not None
            low, high = (torch.tensor(corner) for corner in episode.prompts.box)
            inside = (where >= low - 1) & (where <= high + 1)
            assert inside.all(1).float().mean() > 0.85, "balls hardly leave their box"
            assert abs(float(where[:, 0].min()) - 0.5 - float(low[0])) < 1.5
            assert float(low[0]) <= episode.prompts.middle <= float(high[0])


def test_painted_label_maps_show_their_objects(folder: Path) -> None:
    config = _config(synthetic=1.0)
    maps = load_folder(folder / "maps")
    sampler = EpisodeSampler(load_folder(folder), maps, config, np.random.default_rng(0))
    seen = [sampler.draw(16) for _ in range(20)]
    assert {episode.source for episode in seen} == {"LM_balls"}
    partly = [e for e in seen if not e.target.all()]  # else there is nothing to stand out from
    assert len(partly) > 10
    contrast = [
        abs(e.image[e.target.bool()].mean() - e.image[~e.target.bool()].mean()) for e in partly
    ]
    assert np.mean(contrast) > 0.1


def test_a_modality_without_weight_is_an_error(folder: Path) -> None:
    volumes: list[LabelledVolume] = load_folder(folder)
    config = _config(modality_weights=[["MR", 1.0]])
    with pytest.raises(ValueError, match=r"no volume of a modality in \['MR'\]; found \['CT'\]"):
        EpisodeSampler(volumes, [], config, np.random.default_rng(0))


def test_a_short_run_learns_and_resumes(folder: Path, tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        config = _config(steps=steps, minutes=60, lr=0.01, warmup_steps=5, synthetic=0.0)
        sampler = EpisodeSampler(load_folder(folder), [], config, np.random.default_rng(0))
        return Trainer(Refiner(SMALL), sampler, config, tmp_path)

    def loss(model: Refiner) -> float:
        """On fixed episodes with one click each."""
        config = _config(no_box=1.0, synthetic=0.0)
        sampler = EpisodeSampler(load_folder(folder), [], config, np.random.default_rng(7))
        episodes = [sampler.draw(16) for _ in range(16)]
        images = torch.stack([e.image for e in episodes])
        target = torch.stack([e.target for e in episodes])
        channels = refiner_channels(
            images, [e.prompts for e in episodes], torch.zeros_like(images), [False] * 16
        )
        with torch.no_grad():
            return float(dice_ce(model(channels), target[:, None]).mean())

    run = trainer(40)
    before = loss(run.model)
    run.run()
    assert loss(run.model) < 0.85 * before
    again = trainer(60)
    again.resume(tmp_path / "checkpoint.pt")
    assert again.step == 40 and again.windows == run.windows
    for ours, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again.run()
    assert again.step == 60


def test_the_rate_warms_up_and_ends_low(folder: Path, tmp_path: Path) -> None:
    config = _config(steps=1000, minutes=60, warmup_steps=10, lr=1e-3, lr_end=0.01)
    sampler = EpisodeSampler(load_folder(folder), [], config, np.random.default_rng(0))
    run = Trainer(Refiner(SMALL), sampler, config, tmp_path)
    rates = []
    for run.step in (0, 9, 500, 1000):
        rates.append(run._rate())
    assert rates[0] == pytest.approx(1e-4, rel=0.01)
    assert rates[1] == pytest.approx(1e-3, rel=0.01)
    assert rates[2] == pytest.approx(5e-4, rel=0.02)
    assert rates[3] == pytest.approx(1e-5, rel=0.01)


def test_the_loss_is_small_for_the_truth_and_large_for_its_opposite() -> None:
    target = (torch.rand(3, 1, 8, 8, 8) > 0.7).float()
    logits = 20 * (2 * target - 1)
    assert dice_ce(logits, target).shape == (3,)
    assert float(dice_ce(logits, target).max()) < 0.01
    assert float(dice_ce(-logits, target).min()) > 10


def test_configuration_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"received \['nonsense'\]; accepted: \['steps'"):
        Config.from_dict({"nonsense": 1})
    with pytest.raises(ValueError, match="'lr'; accepted: key=value"):
        Config.load(None, ["lr"])


def test_overrides_beat_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("lr: 0.1\nbatch: 3\nwindows: [[0.0, 32]]\n")
    config = Config.load(path, ["lr=0.2"])
    assert (config.lr, config.batch, config.windows) == (0.2, 3, ((0.0, 32),))
