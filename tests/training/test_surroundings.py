"""Close looks in training: they lie in a first window, whose pass they follow as in inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference.model.refiner import CHANNELS
from inference.prompts import WindowPrompts
from inference.refinement import BOX_ALONE
from inference.resampling import covered_cells
from tests.training.balls import config, pool_of, write_balls
from training import pool
from training.dataset import Sample, WindowDataset
from training.refiner_rounds import RefinerRounds
from training.scores import Scores
from training.surroundings import Surroundings
from training.volumes import load_folder

_QUIET = ("gamma", "inversion", "low_resolution", "blur", "shading", "noise", "synthetic")
_ROW = list(range(8))
_COARSE, _MASK = (CHANNELS.index(name) for name in ("coarse_logits", "previous_mask"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Balls whose brightness tells where they are, so that windows can be compared."""
    write_balls(tmp_path)
    z, y, x = np.indices((30, 40, 50))
    for path in tmp_path.glob("*.npz"):
        with np.load(path) as arrays:
            kept = dict(arrays)
        kept["imgs"] = (2 * z + 3 * y + x).astype(np.uint8)
        np.savez(path, **kept)
    return tmp_path


def _close_looks(folder: Path, **values: Any) -> list[tuple[Sample, Surroundings]]:
    settings = config(**{**dict.fromkeys(_QUIET, 0.0), "no_box": 0.0, "zoom": 1.0, **values})
    samples = WindowDataset(load_folder(folder), settings).draw(range(30), 16)
    return [(s, s.around) for s in samples if s.around is not None]


def test_a_close_look_shows_a_part_of_its_surroundings(folder: Path) -> None:
    """The same places, however the window is flipped and its axes permuted."""
    looks = _close_looks(folder, permute=0.7)
    assert len(looks) == 30, "all balls are large for windows of 16 cells"
    for sample, around in looks:
        both = sample.inside & (around.shown(around.inside.float(), 16) == 1)
        assert both.any()
        seen, shown = sample.image[both], around.shown(around.image, 16)[both]
        # Intensities are bytes, 0..245, and a window in which they are scaled spans 60 and more.
        assert (seen - shown).abs().max() < 3
        for first, size in zip(around.first, around.size, strict=True):
            assert 0 < size <= 1 and first > -0.6 and first + 15 * size < 15.6


def test_close_looks_show_the_whole_object_or_a_part(folder: Path) -> None:
    """As the second pass does, in one tile or in several: about half of each."""
    whole = []
    for sample, around in _close_looks(folder, box_scale=(2.2, 2.2), permute=0.0, flip=0.0):
        assert sample.target.any() and not sample.target.all()
        low, high = (torch.tensor(c) for c in around.prompts(sample.prompts).box or ((), ()))
        first, size = torch.tensor(around.first), torch.tensor(around.size)
        shown = (first - size / 2 < low + 0.8) & (first + 15.5 * size > high - 0.8)
        whole.append(bool(shown.all()))
    assert 8 < sum(whole) < 24, "of thirty"


def test_intensities_are_changed_alike(folder: Path) -> None:
    for sample, around in _close_looks(folder, gamma=1.0, inversion=0.5):
        both = sample.inside & (around.shown(around.inside.float(), 16) == 1)
        pair = torch.stack([sample.image[both], around.shown(around.image, 16)[both]])
        assert torch.corrcoef(pair)[0, 1] > 0.95


def test_prompts_mean_the_same_places_in_both_windows(folder: Path) -> None:
    """A field of each window's own coordinates, looked up in the other one, tells them."""
    for _, around in _close_looks(folder)[:5]:
        close = WindowPrompts(
            ((2.0, 3.0, 4.0), (9.0, 8.0, 7.0)), 5.0, (((3.0, 4.0, 5.0), True),), ((6.0, 7.0, 8.0),)
        )
        moved = around.prompts(close)
        assert moved.box is not None
        for axis in range(3):
            field = torch.arange(16.0).reshape([-1 if a == axis else 1 for a in range(3)])
            shown = around.shown(field.expand(16, 16, 16), 16)
            assert moved.clicks[0][0][axis] == pytest.approx(float(shown[3, 4, 5]), abs=1e-4)
            assert moved.clicks[0][1]
            assert moved.elsewhere[0][axis] == pytest.approx(float(shown[6, 7, 8]), abs=1e-4)
            for corner, cell in zip(moved.box, ((2, 3, 4), (9, 8, 7)), strict=True):
                assert corner[axis] == pytest.approx(float(shown[cell]), abs=1e-4)
        assert moved.middle == pytest.approx(around.first[0] + 5 * around.size[0])


def test_a_close_look_corrects_the_mask_where_it_looks() -> None:
    image = torch.zeros(16, 16, 16)
    around = Surroundings(image, image == 0, (3.75, 3.75, 3.75), (0.5, 0.5, 0.5))  # cells 4 to 11
    before = torch.zeros(16, 16, 16, dtype=torch.bool)
    before[:8] = True
    close = torch.zeros(16, 16, 16, dtype=torch.bool)
    close[:, :8] = True
    after = around.taught(before, close)
    expected = before.clone()
    expected[4:12, 4:12, 4:12] = False
    expected[4:12, 4:8, 4:12] = True
    assert torch.equal(after, expected)


@pytest.mark.parametrize("first", [3.75, 4.0, 4.3])
def test_a_corrected_cell_is_the_objects_by_its_share(first: float) -> None:
    """As inference shows voxels to the next first pass; counted at 60 places along each axis."""
    image = torch.zeros(16, 16, 16)
    around = Surroundings(image, image == 0, (first, 3.75, 3.75), (0.5, 0.4, 0.5))
    close = torch.from_numpy(np.random.default_rng(0).random((16, 16, 16)) < 0.45)
    share, seen = close.float(), torch.ones(16, 16, 16, dtype=torch.bool)
    for axis, (start, size) in enumerate(zip(around.first, around.size, strict=True)):
        places = (torch.arange(16 * 60) + 0.5) / 60 - 0.5  # in cells of the first window
        fine = ((places - start) / size + 0.5).floor().long().reshape(16, 60)
        there = ((fine >= 0) & (fine < 16)).float()
        taken = share.movedim(axis, 0)[fine.clamp(0, 15)]
        weights = there.reshape(16, 60, 1, 1)
        share = ((taken * weights).sum(1) / weights.sum(1).clamp_min(1)).movedim(0, axis)
        centre = (torch.arange(16) - start) / size
        within = (centre > -0.5) & (centre < 15.5)
        seen &= within.reshape([-1 if a == axis else 1 for a in range(3)])
    expected = covered_cells((share * seen)[None])[0]
    after = around.taught(image > 0, close)
    assert (after != expected).float().mean() < 0.002 and 0.05 < after[seen].float().mean() < 0.6


def test_a_close_look_leaves_the_mean_of_both_passes(folder: Path) -> None:
    """Two parts of the second and one of the first, as in inference."""
    for first, second, found in ((3.0, -1.0, True), (1.0, -1.0, False), (-3.0, 1.0, False)):
        rounds, _, _ = _start(folder)
        pool_of(rounds).first_pass(_ROW, 16, {})
        batch = pool_of(rounds).batch(torch.full((8, 16, 16, 16), first - 3 * BOX_ALONE))
        pool_of(rounds).advance(torch.full((8, 16, 16, 16), second).masked_fill(batch.beyond, -20))
        for slot in _ROW:
            place = pool_of(rounds)._places[slot]
            around = place.sample.around
            assert around is not None and place.mask is not None
            looked_at = around.taught(torch.zeros_like(place.mask), place.sample.inside)
            assert bool(place.mask[looked_at & around.inside].all()) == found


class _Recorder(torch.nn.Module):
    """Says what is bright, and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(len(CHANNELS), 1, 1)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.layer.weight[0, CHANNELS.index("image")] = 3.0
        self.shown: list[torch.Tensor] = []

    def forward(self, channels: torch.Tensor) -> torch.Tensor:
        self.shown.append(channels)
        logits: torch.Tensor = self.layer(channels)
        return logits


def _start(folder: Path, coarse: bool = False) -> tuple[RefinerRounds, _Recorder, Scores]:
    """A pool of eight close looks that nobody has looked at, and the network that will."""
    shape = {"channels": [16, 16], "blocks": [1, 1], "window": 16, "coarse": coarse}
    settings = config(no_box=0.0, zoom=1.0, synthetic=0.0, no_click=0.0, refiner=shape, rounds=6)
    dataset, network = WindowDataset(load_folder(folder), settings), _Recorder()
    rounds = RefinerRounds(network, dataset, settings, [_ROW], len(_ROW))
    return rounds, network, Scores(dataset.sources, 6)


@pytest.mark.parametrize("coarse", [False, True])
def test_a_close_look_follows_a_first_pass(folder: Path, coarse: bool) -> None:
    """Of its mask, and where the network is to hear them of its logits."""
    rounds, network, scores = _start(folder, coarse)
    with torch.autocast("cpu", torch.bfloat16):
        loss = rounds.loss(0, 0, 0.0, {}, scores)
    loss.backward()  # type: ignore[no-untyped-call]
    assert network.layer.weight.grad is not None and network.layer.weight.grad.abs().sum() > 0
    places = [pool_of(rounds)._places[slot] for slot in _ROW]
    first, second = network.shown
    assert len(first) == len(second) == 8
    assert not first[:, _MASK].any() and not first[:, _COARSE].any()
    for i, place in enumerate(places):
        around = place.sample.around
        assert around is not None and place.mask is not None
        logits = around.shown(network.layer(first[i : i + 1].detach())[0, 0].detach(), 16)
        sure = place.sample.inside & (logits.abs() > 0.1)  # bfloat16 may round the others over 0
        assert torch.equal(second[i, _MASK][sure] > 0, logits[sure] > 0)
        expected = (logits / 3).clamp(-2, 2) if coarse else torch.zeros_like(logits)
        torch.testing.assert_close(second[i, _COARSE].detach(), expected, atol=0.05, rtol=0)
        assert place.mask.shape == around.image.shape and not (place.mask & ~around.inside).any()
    going_on = [i for i in _ROW if places[i].left > 0]
    masks = [places[i].mask for i in _ROW]
    clicks = [places[i].sample.prompts.clicks for i in _ROW]
    rounds.loss(0, 1, 0.0, {}, scores)
    third = network.shown[2]
    assert len(going_on) > 4
    for i in going_on:
        mask = masks[i]
        assert mask is not None and len(clicks[i]) == 1
        if mask.any():
            assert torch.equal(third[i, _MASK] > 0, mask), "the first pass knows the last mask"


@pytest.mark.parametrize("limit", [0.0, 1e6])
def test_in_long_cells_a_close_look_begins_where_it_ended(
    folder: Path, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own mask stays where the first pass changes nothing; in short cells nothing is kept."""
    monkeypatch.setattr(pool, "BLURRING_CELL", limit)
    rounds, network, scores = _start(folder)
    rounds.loss(0, 0, 0.0, {}, scores)
    before = {i: pool_of(rounds)._places[i] for i in _ROW if pool_of(rounds)._places[i].left > 0}
    masks = {i: (place.mask, place.close) for i, place in before.items()}
    assert len(masks) > 4 and all(
        (close is not None) == (limit == 0) for _, close in masks.values()
    )
    saved, _, _ = _start(folder)
    saved.load([rounds.state()])
    rounds.loss(0, 1, 0.0, {}, scores)
    kept = 0
    for i, (mask, close) in masks.items():
        sample = before[i].sample
        around = sample.around
        assert around is not None and mask is not None
        first = network.layer(network.shown[2][i : i + 1].detach())[0, 0].detach()
        expected = (around.shown(first, 16) > 0) & sample.inside
        if close is not None:
            reloaded = pool_of(saved)._places[i].close
            assert reloaded is not None and torch.equal(reloaded, close)
            changed = ((first > 0) & around.inside) != mask
            same = around.shown(changed.float(), 16) <= 0.5
            kept += int((same & (expected != close)).sum())
            expected = torch.where(same, close, expected)
        assert torch.equal(network.shown[3][i, _MASK] > 0, expected)
    assert (kept > 0) == (limit == 0), "the two would not differ, and nothing be tested"
