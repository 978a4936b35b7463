"""Samples: prompts fit objects, synthetic tasks show theirs, a number gives the same sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from inference.model.refiner import CHANNELS
from inference.refinement import BOX_ALONE
from inference.sam_stage import _normalise
from tests.training.balls import TINY_SAM, config, pool_of
from training.augmentation import Chance, change_intensities, masked_z_scores, perturb_mask
from training.dataset import Sample, WindowDataset, _box
from training.losses import dice_score
from training.refiner_rounds import RefinerRounds
from training.scores import Scores
from training.synthesis import random_shape, supervoxel, with_two_tissues
from training.volumes import load_folder


def _dataset(folder: Path, **values: object) -> WindowDataset:
    volumes = load_folder(folder) + load_folder(folder / "maps")
    return WindowDataset(volumes, config(**values))


def _equal(a: Sample, b: Sample) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.target, b.target)


@pytest.mark.parametrize("no_box", [0.0, 1.0])
def test_prompts_fit_the_object(folder: Path, no_box: float) -> None:
    dataset = _dataset(folder, no_box=no_box, synthetic=0.0, zoom=0.0)
    for sample in dataset.draw(range(40), 16):
        target = sample.target
        assert target.any() and sample.image.shape == (16, 16, 16)
        where = target.nonzero().float()
        if no_box:
            ((position, positive),) = sample.prompts.clicks
            assert sample.prompts.box is None and positive
            assert target[tuple(int(v) for v in position)]
        else:
            assert sample.prompts.box is not None
            low, high = (torch.tensor(corner) for corner in sample.prompts.box)
            inside = (where >= low - 1) & (where <= high + 1)
            assert inside.all(1).float().mean() > 0.85, "balls hardly leave their box"
            assert abs(float(where[:, 0].min()) - 0.5 - float(low[0])) < 1.5
            assert float(low[0]) <= sample.prompts.middle <= float(high[0])


def test_windows_with_a_box_are_about_as_large_as_inference_makes_them(folder: Path) -> None:
    dataset = _dataset(folder, no_box=0.0, synthetic=0.0, zoom=0.0, warp=0.0)
    shares = []
    for sample in dataset.draw(range(40), 32):
        assert sample.prompts.box is not None
        low, high = sample.prompts.box
        shares.append(max(b - a for a, b in zip(low, high, strict=True)) / 32)
    assert 1.5 < 1 / np.mean(shares) < 2.2


def test_windows_without_a_box_may_be_smaller_than_the_object(folder: Path) -> None:
    dataset = _dataset(folder, no_box=1.0, synthetic=0.0, warp=0.0)
    shares = [float(sample.target.float().mean()) for sample in dataset.draw(range(60), 16)]
    assert max(shares) > 0.6 and min(shares) < 0.02


def test_first_looks_without_a_box_show_the_whole_volume_and_last_a_round(folder: Path) -> None:
    dataset = _dataset(folder, no_box=1.0, synthetic=0.0, warp=0.0, zoom=0.0, permute=0.0)
    samples = dataset.draw(range(200), 16)
    wide = [sample for sample in samples if sample.wide]
    assert 0.35 < len(wide) / 200 < 0.55
    edges_mm = [16 * cell * mm for s in wide for cell, mm in zip(s.cell, (3, 2, 1), strict=True)]
    assert 0.35 * 90 < min(edges_mm) < max(edges_mm) < 1.7 * 90, "of a volume of 90 mm"
    assert not any(s.wide for s in _dataset(folder, no_box=0.0, zoom=0.0).draw(range(40), 16))

    rounds = RefinerRounds(torch.nn.Identity(), dataset, config(rounds=6), [list(range(200))], 200)
    pool_of(rounds)._fill(list(range(200)), 16, {})
    left = {place.left for place in pool_of(rounds)._places.values() if place.sample.wide}
    assert left == {1}
    assert max(place.left for place in pool_of(rounds)._places.values()) == 6


class _Anything(torch.nn.Module):
    """Says the same within the windows of a batch, and what it is told beyond their volumes."""

    def __init__(self, beyond: float) -> None:
        super().__init__()
        self.beyond = torch.nn.Parameter(torch.tensor(beyond))
        self.inside = torch.empty(0)

    def forward(self, channels: torch.Tensor) -> torch.Tensor:
        return torch.where(self.inside[:, None], channels[:, :1], self.beyond)


def test_what_is_said_beyond_the_volume_does_not_count(folder: Path) -> None:
    """No loss, no gradient, no mask and no click comes from there; real objects end there, too."""
    dataset = _dataset(folder, no_box=1.0, synthetic=0.3, supervoxels=0.3, warp=0.5, zoom=0.0)
    row = list(range(24))
    for sample in dataset.draw(row, 16):
        assert not (sample.target & ~sample.inside).any()
    found = []
    for beyond in (-9.0, 9.0):
        network = _Anything(beyond)
        rounds = RefinerRounds(network, dataset, config(rounds=3, no_click=0.0), [row], len(row))
        pool_of(rounds)._fill(row, 16, {})
        places = [pool_of(rounds)._places[slot] for slot in row]
        network.inside = torch.stack([place.sample.inside for place in places])
        assert 0.2 < float(network.inside.float().mean()) < 0.95
        loss = rounds.loss(0, 0, 0.0, {}, Scores(dataset.sources, 3))
        loss.backward()  # type: ignore[no-untyped-call]
        assert network.beyond.grad == 0
        masks = torch.stack([m for place in places if (m := place.mask) is not None])
        assert len(masks) == len(row) and not (masks & ~network.inside).any()
        found.append((float(loss.detach()), masks, [place.sample.prompts for place in places]))
    (loss, masks, prompts), (other_loss, other_masks, other_prompts) = found
    assert loss == other_loss and torch.equal(masks, other_masks) and prompts == other_prompts


def test_made_up_shapes_are_known_everywhere(folder: Path) -> None:
    for sample in _dataset(folder, shapes=1.0, synthetic=0.0).draw(range(8), 16):
        assert sample.inside.all()


def test_some_of_the_masks_made_worse_are_poor() -> None:
    target = torch.zeros(32, 32, 32, dtype=torch.bool)
    target[8:24, 8:24, 8:24] = True
    layer = torch.zeros_like(target)
    layer[15:17] = True
    overlaps: list[list[float]] = [[], []]
    for seed in range(60):
        for found, mask in zip(overlaps, (target, layer), strict=True):
            poor = perturb_mask(mask, Chance(seed, mask.device))
            found.append(float(dice_score(poor[None], mask[None])))
    block, thin = (np.array(found) for found in overlaps)
    assert block.min() > 0.5 and np.mean(block > 0.9) > 0.5
    assert 0.1 < np.mean(thin < 0.5) < 0.7 and np.mean(thin > 0.8) > 0.2


@pytest.mark.parametrize("poor", [0.0, 1.0])
def test_rounds_may_begin_with_poor_masks(folder: Path, poor: float) -> None:
    """After a box alone they are drawn towards its ellipsoid, else coarse and noisy."""
    dataset = _dataset(folder, no_box=0.0, zoom=0.0)
    row = list(range(12))
    values = {"poor_mask": poor, "no_click": 0.0, "rounds": 6}
    network = torch.nn.Conv3d(len(CHANNELS), 1, 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.constant_(network.bias, -1.0)  # nothing anywhere, until the ellipsoid is added
    rounds = RefinerRounds(network, dataset, config(**values), [row], len(row))
    pool_of(rounds)._fill(row, 16, {})
    places = [pool_of(rounds)._places[slot] for slot in row]
    scores = Scores(dataset.sources, 6)
    rounds.loss(0, 0, 0.0, {}, scores)
    sizes = [(int(m.sum()), m & ~p.sample.target) for p in places if (m := p.mask) is not None]
    if poor:
        for size, outside in sizes:
            assert size and int(outside.sum()) < 0.5 * size
    else:
        assert not any(size for size, _ in sizes)
    going_on = [place for place in places if place.left > 0]
    before = [place.mask for place in going_on]
    with torch.no_grad():
        network.weight[0, CHANNELS.index("previous_mask")] = 10.0  # says what it is shown
    rounds.loss(0, 1, 0.0, {}, scores)
    pairs = [(a, p.mask) for a, p in zip(before, going_on, strict=True)]
    same = [a is not None and b is not None and torch.equal(a, b) for a, b in pairs]
    assert len(same) > 6 and (not any(same) if poor else all(same))


def test_it_is_known_where_other_objects_are(folder: Path) -> None:
    values = {"no_box": 0.0, "others": 1.0, "synthetic": 0.0, "zoom": 0.0, "inversion": 0.0}
    samples = _dataset(folder, tell_apart=1.0, **values).draw(range(40), 16)
    known = [sample for sample in samples if sample.beside is not None]
    assert sum(bool(sample.beside.any()) for sample in known) > 10
    for sample in known:
        assert sample.prompts.others and set(sample.beside.unique().tolist()) <= {0, 2}
        assert not (sample.beside[sample.target] > 0).any(), "balls do not touch"
        # The other ball is brighter than what is around both of them.
        other = sample.image[sample.beside == 2]
        rest = sample.image[(sample.beside == 0) & ~sample.target]
        assert not len(other) or float(other.mean()) > float(rest.quantile(0.9))
    for changed in ({"tell_apart": 0.0}, {"tell_apart": 1.0, "others": 0.0}):
        samples = _dataset(folder, **{**values, **changed}).draw([0, 1], 16)
        assert all(sample.beside is None for sample in samples)


def test_no_part_of_joined_objects_is_another_one(tmp_path: Path) -> None:
    """Of three balls in a row two are the object and the third one, if any, lies beside it."""
    grid = np.indices((17, 39, 39)).transpose(1, 2, 3, 0)
    gts = np.zeros(grid.shape[:3], np.uint8)
    for label, centre in enumerate([10, 19, 28], start=1):
        gts[((grid - [8, centre, centre]) ** 2).sum(-1) < 37] = label
    np.savez(tmp_path / "CT_row_0.npz", imgs=gts * 60, gts=gts, spacing=[1.0, 1.0, 1.0])
    values = {"no_box": 0.0, "others": 1.0, "warp": 0.0, "joined": 1.0, "tell_apart": 1.0}
    samples = WindowDataset(load_folder(tmp_path), config(**values)).draw(range(40), 16)
    known = [sample for sample in samples if sample.beside is not None]
    assert sum(bool(sample.beside.any()) for sample in known) > 10
    for sample in known:
        assert len(sample.prompts.others) == 1 and set(sample.beside.unique().tolist()) <= {0, 2}
        assert not (sample.beside[sample.target] > 0).any(), "balls do not touch"


def test_masks_may_be_told_apart_by_intensities(folder: Path) -> None:
    """As inference does it before users see them: a ball's ellipsoid comes closer to the ball."""
    found = []
    for share in (0.0, 1.0):
        values = {"no_box": 0.0, "others": 1.0, "synthetic": 0.0, "zoom": 0.0, "rounds": 6}
        dataset = _dataset(folder, tell_apart=share, **values)
        row = list(range(12))
        network = torch.nn.Conv3d(len(CHANNELS), 1, 1)
        torch.nn.init.zeros_(network.weight)
        torch.nn.init.constant_(network.bias, 0.7)  # a large ellipsoid
        with torch.no_grad():
            network.weight[0, CHANNELS.index("ellipsoid")] = 1.0
        rounds = RefinerRounds(
            network, dataset, config(tell_apart=share, **values), [row], len(row)
        )
        pool_of(rounds)._fill(row, 16, {})
        places = [pool_of(rounds)._places[slot] for slot in row]
        rounds.loss(0, 0, 0.0, {}, Scores(dataset.sources, 6))
        found.append([(p.sample, p.mask) for p in places])
    gains = []
    for (sample, mask), (told, other) in zip(*found, strict=True):
        assert mask is not None and other is not None
        before, after = dice_score(torch.stack([mask, other]), sample.target[None]).tolist()
        if told.beside is None:
            assert torch.equal(mask, other)
        else:
            gains.append(after - before)
    assert len(gains) > 3 and np.mean(gains) > 0.01 and min(gains) > -0.01, gains


def test_rounds_leave_masks_and_others_clicks_as_inference_does(folder: Path) -> None:
    """After a box alone masks are drawn a little larger; each round objects beside get clicks."""
    values = {"no_box": 0.0, "others": 1.0, "zoom": 0.0, "rounds": 6, "no_click": 0.0}
    dataset = _dataset(folder, **values)
    row = list(range(24))
    network = torch.nn.Conv3d(len(CHANNELS), 1, 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.constant_(network.bias, -BOX_ALONE / 2)
    rounds = RefinerRounds(network, dataset, config(**values), [row], len(row))
    pool_of(rounds)._fill(row, 16, {})
    places = [pool_of(rounds)._places[slot] for slot in row]
    places = [place for place in places if place.left > 2]
    told = 0
    for number in range(2):
        rounds.loss(0, number, 0.0, {}, Scores(dataset.sources, 6))
        for place in places:
            inside = place.sample.inside
            assert place.mask is not None and place.round == number + 1
            assert bool(place.mask[inside].all()) == bool(place.mask.any()) == (number == 0)
            known = place.sample.prompts.elsewhere
            assert known == sum(place.sample.elsewhere[: number + 1], ())
            told += len(known)
    assert len(places) > 8 and told > 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_masks_may_be_withheld_after_a_click(folder: Path, share: float) -> None:
    """Not where no click came: such a round would be the first one over again."""
    dataset = _dataset(folder, no_box=0.0, zoom=0.0)
    row = list(range(12))
    for silence in (0.0, 1.0):
        values = {"no_mask": share, "no_click": silence, "rounds": 6}
        network = torch.nn.Conv3d(len(CHANNELS), 1, 1)
        rounds = RefinerRounds(network, dataset, config(**values), [row], len(row))
        pool_of(rounds)._fill(row, 16, {})
        places = pool_of(rounds)._places
        going_on = [places[slot] for slot in row if places[slot].left > 1]
        rounds.loss(0, 0, 0.0, {}, Scores(dataset.sources, 6))
        withheld = [place.mask is None for place in going_on]
        clicked = [bool(place.sample.prompts.clicks) for place in going_on]
        assert len(going_on) > 6 and any(clicked) != bool(silence)
        assert withheld == [bool(share) and click for click in clicked]


def test_a_number_always_gives_the_same_sample(folder: Path) -> None:
    values = {"synthetic": 0.3, "supervoxels": 0.2, "shapes": 0.2, "warp": 0.5}
    dataset = _dataset(folder, **values)
    several = dataset.draw([5, 6, 7], 16)
    (again,) = _dataset(folder, **values).draw([6], 16)
    assert _equal(several[1], again) and several[1].prompts == again.prompts
    assert not _equal(several[0], several[2])
    (other,) = _dataset(folder, **values, seed=1).draw([6], 16)
    assert not _equal(again, other)


@pytest.mark.parametrize("kind", ["synthetic", "supervoxels", "shapes"])
def test_synthetic_objects_stand_out_and_have_their_box(folder: Path, kind: str) -> None:
    shares = {"synthetic": 0.0, "supervoxels": 0.0, "shapes": 0.0, kind: 1.0}
    dataset = _dataset(folder, **shares, no_box=0.0, noise=0.0)
    samples = dataset.draw(range(24), 24)
    name = {"synthetic": "Painted", "supervoxels": "Synthetic_supervoxel"}
    assert {s.source for s in samples} == {name.get(kind, "Synthetic_shape")}
    contrast = []
    for sample in samples:
        assert sample.prompts.box is not None and sample.image.isfinite().all()
        inside, outside = sample.image[sample.target], sample.image[~sample.target]
        if len(outside):
            contrast.append(float((inside.mean() - outside.mean()).abs() / sample.image.std()))
        where = sample.target.nonzero()[:, 0]
        low, high = (corner[0] for corner in sample.prompts.box)
        if kind != "synthetic":
            assert low == float(where.min()) - 0.5 and high == float(where.max()) + 0.5
    assert np.mean(contrast) > 0.4


def test_supervoxels_follow_the_image() -> None:
    """A bright ball in the middle: the supervoxel keeps to one side of its surface."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(32.0) - 15.5] * 3, indexing="ij"))
    ball = grid.square().sum(0) < 7**2
    inside = []
    for seed in range(10):
        mask = supervoxel(100.0 * ball, Chance(seed, torch.device("cpu")))
        assert mask.any() and not mask.all()
        inside.append(float((mask & ball).sum() / mask.sum()))
    assert np.mean(inside) > 0.8


def test_random_shapes_differ_and_look_like_nothing_beside_them_most_times() -> None:
    sizes, alone = [], []
    for seed in range(40):
        labels, mask = random_shape(torch.zeros(24, 24, 24), Chance(seed, torch.device("cpu")))
        assert mask.any() and not mask.all()
        (own,) = labels[mask].unique()
        sizes.append(int(mask.sum()))
        alone.append(not bool((labels[~mask] == own).any()))
    assert len(set(sizes)) > 35
    assert 24 <= sum(alone) < 40


def test_labels_of_two_tissues_have_a_rim_or_two_parts() -> None:
    labels = torch.zeros(24, 24, 24, dtype=torch.int64)
    labels[6:18, 6:18, 6:18] = 1
    core = torch.zeros_like(labels, dtype=torch.bool)
    core[7:17, 7:17, 7:17] = True
    seen = []
    for seed in range(40):
        painted = with_two_tissues(labels, Chance(seed, torch.device("cpu")))
        cube, other = painted[labels == 1].unique(), painted[labels == 0].unique()
        assert len(cube) <= 2 and not set(cube.tolist()) & set(other.tolist())
        inside = painted[core].unique()
        rim = len(cube) == 2 and len(inside) == 1
        if rim:
            assert bool((painted[(labels == 1) & ~core] == cube.max()).all())
        seen.append("one" if len(cube) == 1 else "rim" if rim else "parts")
    assert {kind: seen.count(kind) >= 4 for kind in ("one", "rim", "parts")} == dict.fromkeys(
        ("one", "rim", "parts"), True
    )


def test_boxes_are_padded_as_far_as_there_is_an_image() -> None:
    target, inside = torch.zeros(2, 16, 16, 16, dtype=torch.bool)
    target[2:9, 4:10, 5:12] = True
    inside[2:16, 3:16, :13] = True
    low, high, middle = _box(target, inside, (0.0, 2.5, 2.5))
    assert (low, high, middle) == ((1.5, 2.5, 2.0), (8.5, 12.0, 12.5), 5.0)


def test_sloppy_boxes_are_off_by_a_little(folder: Path) -> None:
    values = {"no_box": 0.0, "synthetic": 0.0, "zoom": 0.0, "warp": 0.0}
    exact = _dataset(folder, **values).draw(range(20), 16)
    sloppy = _dataset(folder, **values, sloppy_box=1.0).draw(range(20), 16)
    off = []
    for a, b in zip(exact, sloppy, strict=True):
        assert a.prompts.box is not None and b.prompts.box is not None
        off += np.abs(np.subtract(a.prompts.box, b.prompts.box)).ravel().tolist()
    assert 0.1 < np.mean(off) < 1.5 and max(off) < 3


def test_intensities_are_left_alone_where_nothing_is_to_change(folder: Path) -> None:
    still = dict.fromkeys(("gamma", "inversion", "low_resolution", "blur", "shading", "noise"), 0.0)
    raw = _dataset(folder, **still, synthetic=0.0).draw(range(4), 16)
    assert max(float(sample.image.max()) for sample in raw) > 100
    changed = change_intensities(raw[0].image, config(), Chance(0, torch.device("cpu")))
    assert changed.isfinite().all() and float(changed.max()) < 5


def test_z_scores_are_those_of_the_sam_stage() -> None:
    images = torch.rand(3, 8, 8, 8) * 100 - 40
    images[1] = -images[1].abs()  # nothing above 0
    images[2] = 7.0
    ours = masked_z_scores(images)
    for one, image in zip(ours, images, strict=True):
        torch.testing.assert_close(one, _normalise(image), rtol=1e-4, atol=1e-4)


def test_objects_too_small_to_show_are_reported(tmp_path: Path) -> None:
    gts = np.zeros((8, 300, 300), np.uint8)
    gts[4, 150, 146:154] = 1
    np.savez(tmp_path / "CT_thread_0.npz", imgs=gts, gts=gts, spacing=[9.0, 9.0, 9.0])
    settings = config(network="sam_med3d", sam=TINY_SAM | {"windows": "1.5mm"}, synthetic=0.0)
    dataset = WindowDataset(load_folder(tmp_path), settings)
    assert dataset.draw([0], 32)[0].target.any()
    with pytest.raises(ValueError, match="shows 8 cells of an object after 100 attempts"):
        WindowDataset(
            load_folder(tmp_path), config(box_scale=[90.0, 99.0], no_box=0.0, zoom=0.0)
        ).draw([0], 16)
