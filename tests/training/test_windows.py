"""Windows cut from the store show what inference's windows show, and pyramids keep the mean."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from inference.geometry import Window, window_around
from inference.model.sam_med3d import SamMed3D
from inference.resampling import window_cells
from inference.sam_stage import SamStage
from tests.training.balls import TINY_SAM, config, write_balls
from training.click_simulation import challenge_box
from training.losses import dice_score
from training.plan import Plan, Planner
from training.view import View
from training.volumes import LabelledVolume, VolumeStore, load_folder
from training.windows import choose_level, cut_windows

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors here are too small for two

STILL = {"warp": 0.0, "permute": 0.0, "flip": 0.0, "synthetic": 0.0}


@pytest.fixture
def store(tmp_path: Path) -> VolumeStore:
    """Two smooth volumes of anisotropic voxels with a few objects each."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(25, 90, 80), (70, 64, 33)]):
        smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 9)
        labels = np.digitize(smooth, np.quantile(smooth, [0.6, 0.85])).astype(np.uint8)
        image = labels * 60 + rng.normal(40, 3, shape)
        np.savez(
            tmp_path / f"CT_smooth_{i}.npz",
            imgs=image.clip(0, 255).astype(np.uint8),
            gts=labels,
            spacing=[1.0, 1.0, 3.0 - i],
        )
    return VolumeStore(load_folder(tmp_path), "cpu")


def _window(plan: Plan) -> Window:
    """The window of a plan without flips, permutation and warp."""
    size = 2 * np.abs(plan.scale).sum(1)
    start = np.round(plan.origin + 0.5 - size / 2).astype(int)
    low, high = start.tolist(), (start + np.round(size).astype(int)).tolist()
    return Window(tuple(low), tuple(high), (plan.edge,) * 3)


def _as_inference(volume: LabelledVolume, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and the object's share in a plan's window, as inference resamples them."""
    assert volume.image is not None
    window = _window(plan)
    cells = window_cells(volume.image.numpy(), window, edge=True)[0]
    return cells, window_cells(volume.labels.numpy(), window, label=plan.label)[0]


def _displacement(ours: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Cells along each axis by which ``ours`` lies further on, by least squares."""
    inner = (slice(1, -1),) * 3
    slopes = torch.stack([slope[inner].flatten() for slope in torch.gradient(expected)], 1)
    difference = (expected - ours)[inner].flatten()
    found: list[float] = torch.linalg.solve(slopes.T @ slopes, slopes.T @ difference).tolist()
    return found


@pytest.mark.parametrize("edge", [24, 48])
def test_windows_look_as_inference_sees_them(store: VolumeStore, edge: int) -> None:
    """Alike in image and object, and in the same place: half a cell beside it is seen."""
    planner = Planner(store, config(**STILL, no_box=0.5))
    errors, alike = [], []
    off: dict[float, list[list[float]]] = {0.0: [], 0.5: []}
    for i in range(40):
        plan = planner.plan(i, np.random.default_rng(i), edge)
        expected, object_ = _as_inference(store.volumes[plan.volume], plan)
        cell = 2 * np.abs(plan.scale).sum(1) / edge
        for shift, found in off.items():
            moved = dataclasses.replace(plan, origin=plan.origin - shift * cell)
            image, share, _ = cut_windows(store, [moved])
            found.append(_displacement(image[0], expected) + _displacement(share[0], object_))
            if not shift:
                errors.append(float((image[0] - expected).std() / expected.std()))
                pair = torch.stack([share[0].flatten(), object_.flatten()])
                alike.append(float(torch.corrcoef(pair)[0, 1]))
    assert np.median(errors) < 0.15
    assert np.median(alike) > 0.94
    assert np.mean(off[0.0], 0) == pytest.approx(np.zeros(6), abs=0.1)
    assert np.mean(off[0.5], 0) == pytest.approx(np.full(6, 0.5), abs=0.1)


def test_prompts_of_other_objects_lie_where_these_are(tmp_path: Path) -> None:
    """In windows turned, flipped and permuted at will, judged by the labels cut with them."""
    store = VolumeStore(load_folder(write_balls(tmp_path)), "cpu")
    planner = Planner(store, config(warp=0.5, permute=0.5, others=1.0, no_box=0.5, synthetic=0.0))
    clicked, boxes = [], []
    for i in range(300):
        plan = planner.plan(i, np.random.default_rng(i), 32)
        (labels,), _, (inside,) = cut_windows(store, [plan], shown=False)
        for place in np.concatenate(plan.elsewhere).round().astype(int):
            if (place >= 0).all() and (place < 32).all():  # a close look knows of more
                clicked.append(int(labels[tuple(place)]) == 3 - plan.label)
        there = (inside & (labels == 3 - plan.label)).numpy()
        whole = not any(there.take(side, axis).any() for axis in range(3) for side in (0, -1))
        if plan.bend is None and there.any() and whole and len(plan.others):
            (pair,) = plan.others
            where = np.argwhere(there)
            found = np.array([where.min(0) - 0.5, where.max(0) + 0.5])
            boxes.append(np.abs(pair - found).max() - max(plan.padding))
    assert len(clicked) > 60 and np.mean(clicked) > 0.9
    assert len(boxes) > 20 and np.median(boxes) < 1, "cells, the padding apart"


def test_close_looks_know_what_is_said_in_the_window_they_lie_in(tmp_path: Path) -> None:
    """As inference shows it to both passes: whole, and nothing from beyond."""
    store = VolumeStore(load_folder(write_balls(tmp_path)), "cpu")
    settings = config(zoom=1.0, others=1.0, warp=0.0, synthetic=0.0, no_box=0.0, permute=0.5)
    planner = Planner(store, settings)
    beyond = []
    for i in range(200):
        plan = planner.plan(i, np.random.default_rng(i), 16)
        if plan.around is None:
            continue
        first, size = (np.array(v) for v in plan.within(plan.around))
        clicked = np.concatenate(plan.elsewhere)
        for places in (clicked, plan.others.mean(1)):
            beyond += ((places < -0.5) | (places > 15.5)).any(1).tolist()
        there = first + size * clicked
        assert (there > -0.5).all() and (there < 15.5).all()
        edges = first + size * plan.others
        assert (edges[:, 1] > -0.5).all() and (edges[:, 0] < 15.5).all()
    assert len(beyond) > 40 and 0.2 < np.mean(beyond) < 0.9


def test_boxes_are_padded_as_the_challenges(tmp_path: Path) -> None:
    """By one shift an object, in whole voxels, and not beyond the image."""
    labels = np.zeros((12, 300, 600), np.uint8)
    labels[2:8, 100:140, 200:280], labels[3:9, 0:30, 590:600] = 1, 2
    np.savez(tmp_path / "CT_wide_0.npz", imgs=labels * 90, gts=labels, spacing=[1, 1, 1])
    (volume,) = load_folder(tmp_path)
    inner, outer = volume.objects
    found = set()
    for seed in range(60):
        view = View(volume, inner, (0, 1, 2), np.random.default_rng(seed))
        (low, high, middle), (_, y, x) = view.edges, view.padding
        assert low == (1.5, 99.5 - y, 199.5 - x) and high == (7.5, 139.5 + y, 279.5 + x)
        assert middle == 5
        found.add((y, x))
        shift = int(np.random.default_rng(seed).integers(6))
        padding = view.draw_padding(np.random.default_rng(seed))
        y, x = int(shift * 300 / 256), int(shift * 600 / 256)
        assert padding == (0.0, y, x)
        assert view.edges_of(outer, padding) == ((2.5, -0.5, 589.5 - x), (8.5, 29.5 + y, 599.5))
    assert found == {(int(s * 300 / 256), int(s * 600 / 256)) for s in range(6)}


def test_joined_objects_are_one(store: VolumeStore) -> None:
    """Mask, box, deepest point and window are of both, and neither is another object."""
    planner = Planner(store, config(**STILL, joined=1.0, others=1.0, box_scale=[2.0, 2.0]))
    left = []
    for i in range(20):
        plan = planner.plan(i, np.random.default_rng(i), 32, boxed=True)
        volume = store.volumes[plan.volume]
        assert {plan.label, plan.also} == {1, 2} and not len(plan.others) + sum(
            map(len, plan.elsewhere)
        )
        both = torch.where(volume.labels > 0, plan.label, 0)
        as_one = dataclasses.replace(volume, labels=both)
        _, theirs = _as_inference(as_one, plan)
        _, (ours,), _ = cut_windows(store, [plan])
        assert dice_score(ours[None] > 0.5, theirs[None] > 0.5).item() > 0.9
        low, high, _ = challenge_box(both.numpy() > 0)
        assert plan.box is not None
        cells = np.array([_window(plan).to_grid(point) for point in (low, high)])
        ends = [-0.5, -0.5, -0.5], [n - 0.5 for n in both.shape]
        first, last = (np.array(_window(plan).to_grid(end)) for end in ends)
        padded = np.clip(cells + np.array([[-1], [1]]) * plan.padding, first, last)
        assert np.abs(np.array(plan.box[:2]) - padded).max() < 0.1
        left.append(plan.label)
    assert set(left) == {1, 2}


def test_an_object_far_from_others_stays_alone(tmp_path: Path) -> None:
    labels = np.zeros((12, 40, 40), np.uint8)
    labels[2:8, 2:9, 2:9], labels[2:8, 20:30, 20:30] = 1, 2
    np.savez(tmp_path / "CT_far_0.npz", imgs=labels * 90, gts=labels, spacing=[1, 1, 1])
    planner = Planner(VolumeStore(load_folder(tmp_path), "cpu"), config(**STILL, joined=1.0))
    assert not any(planner.plan(i, np.random.default_rng(i), 16).also for i in range(20))


def test_others_may_be_unknown(store: VolumeStore) -> None:
    planner = Planner(store, config(others=0.5, synthetic=0.0))
    known = [len(planner.plan(i, np.random.default_rng(i), 16).others) for i in range(200)]
    assert 0.3 < np.mean(np.array(known) > 0) < 0.6


def test_objects_end_where_the_volume_ends(tmp_path: Path) -> None:
    """Also in coarse levels, whose last voxels reach beyond it."""
    shape = (33, 33, 65)
    np.savez(
        tmp_path / "CT_full_0.npz",
        imgs=np.zeros(shape, np.uint8),
        gts=np.ones(shape, np.uint8),
        spacing=[1.0, 1.0, 1.0],
    )
    store = VolumeStore(load_folder(tmp_path), "cpu")
    plan = Planner(store, config(**STILL)).plan(0, np.random.default_rng(0), 64)
    middle = np.array(shape) / 2 - 0.5
    plan = dataclasses.replace(plan, scale=np.eye(3) * 128, origin=middle)
    assert choose_level(store.levels[0], plan).factor == (2, 2, 2)
    _, share, inside = cut_windows(store, [plan])
    assert torch.equal(share > 0, inside)
    # Cells of four voxels: eight and sixteen middles lie inside.
    assert (share > 0).sum((2, 3)).amax().item() == 8 * 16
    assert (share[0] > 0).any(2).any(1).sum().item() == 8


def test_a_window_of_whole_voxels_is_copied_exactly(store: VolumeStore) -> None:
    planner = Planner(store, config(**STILL))
    plan = planner.plan(0, np.random.default_rng(0), 16)
    volume = store.volumes[plan.volume]
    assert volume.image is not None
    plan = dataclasses.replace(plan, scale=np.eye(3) * 8, origin=np.array([5, 30, 15]) + 7.5)
    image, share, _ = cut_windows(store, [plan])
    expected = volume.image[5:21, 30:46, 15:31].float()
    torch.testing.assert_close(image[0], expected, rtol=0, atol=0.01)  # float32 places
    assert torch.equal(share[0] > 0.5, volume.labels[5:21, 30:46, 15:31] == plan.label)


def test_outside_images_and_labels_go_on_as_their_edge_and_objects_do_not(
    store: VolumeStore,
) -> None:
    plan = Planner(store, config(**STILL)).plan(0, np.random.default_rng(0), 16)
    volume = store.volumes[plan.volume]
    assert volume.image is not None
    far = np.array(volume.labels.shape) + 99.0
    plan = dataclasses.replace(plan, scale=np.eye(3) * 8, origin=far)
    image, share, inside = cut_windows(store, [plan])
    assert (image == volume.image[-1, -1, -1]).all() and not share.any() and not inside.any()
    labels, _, _ = cut_windows(store, [plan], shown=False)
    assert (labels == volume.labels[-1, -1, -1]).all()


def test_batches_are_cut_as_single_windows(
    store: VolumeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(store, config(warp=0.7))
    plans = [planner.plan(i, np.random.default_rng(i), 16) for i in range(9)]
    single = cut_windows(store, plans)
    monkeypatch.setattr("training.windows._CHUNK", {})
    together = cut_windows(store, plans)
    for a, b in zip(single, together, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2e-3)


def test_flips_and_permutations_turn_image_and_object_alike(store: VolumeStore) -> None:
    base = Planner(store, config(**STILL)).plan(3, np.random.default_rng(3), 16)
    shown = cut_windows(store, [base])
    turned = dataclasses.replace(
        base, scale=base.scale[:, [2, 0, 1]], turn=np.diag([1.0, -1.0, 1.0])
    )
    for before, after in zip(shown, cut_windows(store, [turned]), strict=True):
        # The new axes show the old ones 2, 0, 1; the second of them is reversed.
        expected = before[0].permute(2, 0, 1).flip(1)
        torch.testing.assert_close(after[0].float(), expected.float(), rtol=0, atol=2e-3)


def test_levels_keep_the_mean_and_halve_the_finest_axes(store: VolumeStore) -> None:
    for volume, levels in zip(store.volumes, store.levels, strict=True):
        assert volume.image is not None
        assert levels[0].shape == tuple(volume.labels.shape) and len(levels) > 1
        last = levels[-1]
        assert max(last.shape) <= 32
        seen = store.images[last.offset :][: np.prod(last.shape)].float().mean()
        assert float(seen) == pytest.approx(float(volume.image.float().mean()), abs=8)
        spacing = np.array(volume.spacing_mm) * levels[1].factor
        assert spacing.max() / spacing.min() <= max(volume.spacing_mm)


def test_volumes_are_read_with_spacing_in_our_order(tmp_path: Path) -> None:
    volume = load_folder(write_balls(tmp_path))[0]
    assert volume.spacing_mm == (3.0, 2.0, 1.0)
    assert (volume.modality, volume.source) == ("CT", "CT_balls")
    assert [seen.label for seen in volume.objects] == [1, 2]
    assert volume.objects[1].deepest[1:] == pytest.approx((25, 36), abs=1)


def test_all_names_of_a_modality_are_trained_on(tmp_path: Path) -> None:
    folder = write_balls(tmp_path)
    for name in ("Micro", "Ultrasound", "MRI"):
        shutil.copy(folder / "CT_balls_0.npz", folder / f"{name}_balls_0.npz")
    found = [(volume.modality, volume.source) for volume in load_folder(folder)[-3:]]
    assert found == [(m, f"{m}_balls") for m in ("MR", "Microscopy", "US")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, -1), "labels -1 to 1"),
        ((1, 40000), "40000; accepted: up to 32767"),
        ((1, 65537), "labels 0 to 65537"),
        ((1.5, 2), "whole"),
    ],
)
def test_labels_that_cannot_be_kept_are_refused(
    tmp_path: Path, values: tuple[float, float], message: str
) -> None:
    labels = np.zeros((8, 12, 12), np.result_type(*values))
    labels[1:4, 1:5, 1:5], labels[4:7, 6:9, 6:9] = values
    np.savez(tmp_path / "CT_a_0.npz", imgs=np.zeros((8, 12, 12)), gts=labels, spacing=[1, 1, 1])
    with pytest.raises(ValueError, match=f"CT_a_0: .*{message}"):
        load_folder(tmp_path)


def test_a_case_list_chooses_among_the_files(tmp_path: Path) -> None:
    folder = write_balls(tmp_path)
    (volume,) = load_folder(folder, ["CT_balls_1.npz"])
    assert volume.name == "CT_balls_1"
    with pytest.raises(ValueError, match="lacks 1 of 2 listed cases, CT_gone first"):
        load_folder(folder, ["CT_balls_1", "CT_gone"])


def test_folders_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accepted: npz files with gts"):
        load_folder(tmp_path)
    np.savez(tmp_path / "CT_a_0.npz", imgs=np.zeros((4, 4, 4)), spacing=[1, 1, 1])
    with pytest.raises(ValueError, match="accepted: npz with gts and spacing"):
        load_folder(tmp_path)


def test_a_modality_without_weight_is_an_error(tmp_path: Path) -> None:
    store = VolumeStore(load_folder(write_balls(tmp_path)), "cpu")
    with pytest.raises(ValueError, match=r"no volume of a modality in \['MR'\]; found \['CT'\]"):
        Planner(store, config(modality_weights=[["MR", 1.0]]))


def test_public_windows_are_those_of_the_sam_stage(store: VolumeStore) -> None:
    """The same cube at 1.5 mm; a coarser one where the object is large."""
    settings = config(network="sam_med3d", sam=TINY_SAM, **STILL)
    stage = SamStage(SamMed3D(settings.sam), torch.device("cpu"))
    planner = Planner(store, settings)
    for i in range(12):
        plan = planner.plan(i, np.random.default_rng(i), 32)
        volume = store.volumes[plan.volume]
        seen = next(o for o in volume.objects if o.label == plan.label)
        shape = (32, 32, 32)
        region = window_around(seen.start, seen.stop, shape, volume.spacing_mm, 1.8)
        theirs = stage.window(region, volume.spacing_mm)
        ours = _window(plan)
        assert np.abs(np.subtract(ours.size, theirs.size)).max() <= 0.02 * max(ours.size) + 1
        assert np.abs(np.subtract(ours.start, theirs.start)).max() <= 2


def test_an_epoch_shows_every_object_once(store: VolumeStore) -> None:
    planner = Planner(store, config(**STILL, sampling="epochs", seed=4))
    count = planner.objects
    seen = []
    for number in range(2 * count):
        plan = planner.plan(number, np.random.default_rng(number), 16)
        seen.append((plan.volume, plan.label))
    assert len(set(seen[:count])) == len(set(seen[count:])) == count
    assert seen[:count] != seen[count:]


def test_hard_datasets_are_drawn_more_often(tmp_path: Path) -> None:
    folder = write_balls(tmp_path)
    (folder / "CT_balls_1.npz").rename(folder / "CT_other_1.npz")
    planner = Planner(VolumeStore(load_folder(folder), "cpu"), config(hard=2.0, synthetic=0.0))
    dice = {"CT_balls": 0.9, "CT_other": 0.4}
    plans = [planner.plan(i, np.random.default_rng(i), 16, dice=dice) for i in range(300)]
    share = np.mean([plan.volume == 1 for plan in plans])
    assert share == pytest.approx(0.7**2 / (0.7**2 + 0.2**2), abs=0.06)


@pytest.mark.parametrize("other", ["Microscopy", "PET", "US"])
def test_ct_and_mr_stay_upright_and_others_do_not(tmp_path: Path, other: str) -> None:
    folder = write_balls(tmp_path)
    (folder / "CT_balls_1.npz").rename(folder / f"{other}_balls_1.npz")
    weights = (("CT", 0.5), (other, 0.5))
    turning = {**STILL, "flip": 0.5, "permute": 0.5}
    settings = config(**turning, upright=0.8, modality_weights=weights)
    planner = Planner(VolumeStore(load_folder(folder), "cpu"), settings)
    plans = [planner.plan(i, np.random.default_rng(i), 16) for i in range(400)]

    def turned(modality: str) -> float:
        few = [p for p in plans if planner._store.volumes[p.volume].modality == modality]
        sides = np.mean([p.turn[2, 2] < 0 for p in few])
        assert sides == pytest.approx(0.5, abs=0.09), "left and right always may"
        still = [bool((np.diag(p.turn)[:2] > 0).all() and np.diag(p.scale).all()) for p in few]
        return 1 - float(np.mean(still))

    usually = 1 - (0.5 + 0.5 / 6) * 0.5**2  # at random: no flip, no axis elsewhere
    assert turned("CT") == pytest.approx(0.2 * usually, abs=0.07)
    assert turned(other) == pytest.approx(usually, abs=0.07)
