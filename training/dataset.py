"""Labelled volumes on the device, and the windows that training cuts from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import edt
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from inference.geometry import Triple, Window, window_around
from inference.prompts import WindowPrompts
from inference.resampling import resample
from training.augmentation import change_intensities, paint, perturb_mask, warp
from training.click_simulation import challenge_box, next_click
from training.config import Config

_SMALLEST_OBJECT = 8  # voxels


@dataclass(frozen=True)
class LabelledVolume:
    """A volume with its objects; ``image`` is None for a label map without an image."""

    name: str
    image: Tensor | None
    labels: Tensor
    spacing_mm: tuple[float, float, float]  # (z, y, x)
    objects: tuple[tuple[int, Triple, Triple], ...]  # label, start, stop

    @property
    def modality(self) -> str:
        """The part of the file name before the first underscore."""
        return self.name.split("_")[0]

    @property
    def source(self) -> str:
        """Modality and dataset, the first two parts of the file name."""
        return "_".join(self.name.split("_")[:2])


def load_folder(folder: Path, device: torch.device | str = "cpu") -> list[LabelledVolume]:
    """Read every challenge npz with ``gts`` in a folder.

    Raises:
        ValueError: where the folder holds none.
    """
    volumes = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["gts"]
            image = arrays.get("imgs")
            x, y, z = (float(v) for v in arrays["spacing"])
        kind = np.uint8 if labels.max() < 256 else np.int16
        labels = np.ascontiguousarray(labels.astype(kind))
        objects = []
        for label, place in enumerate(ndimage.find_objects(labels.astype(np.int32)), start=1):
            if place is None or (labels[place] == label).sum() < _SMALLEST_OBJECT:
                continue
            start = (place[0].start, place[1].start, place[2].start)
            objects.append((label, start, (place[0].stop, place[1].stop, place[2].stop)))
        if image is not None:
            image = (
                np.clip(np.nan_to_num(image.astype(np.float32)), 0, 255).round().astype(np.uint8)
            )
        tensor = None if image is None else torch.from_numpy(image).to(device)
        volumes.append(
            LabelledVolume(
                path.stem, tensor, torch.from_numpy(labels).to(device), (z, y, x), tuple(objects)
            )
        )
    if not any(volume.objects for volume in volumes):
        raise ValueError(f"{folder} holds no labelled volume; accepted: npz files with gts")
    return [volume for volume in volumes if volume.objects]


@dataclass
class Episode:
    """One object in one window over the rounds of its interaction.

    Attributes:
        image: (D, H, W) intensities.
        target: (D, H, W) 0/1.
        prompts: box and clicks so far, in cells.
        mask: (D, H, W) the last prediction, 0/1, or None before the first.
        cell: edge lengths of a cell in voxels.
        rounds: rounds left, this one included.
        source: where the object comes from, for the log.
        round: 0 in the round of the box.
    """

    image: Tensor
    target: Tensor
    prompts: WindowPrompts
    mask: Tensor | None
    cell: tuple[float, float, float]
    rounds: int
    source: str
    round: int = 0


class EpisodeSampler:
    """Draws objects by modality, dataset, case and class, and cuts their windows."""

    def __init__(
        self,
        volumes: Sequence[LabelledVolume],
        label_maps: Sequence[LabelledVolume],
        config: Config,
        rng: np.random.Generator,
    ) -> None:
        """Group the volumes; a modality without a weight in ``config`` is left out."""
        self._config, self._rng = config, rng
        self._label_maps = list(label_maps)
        tree: dict[str, dict[str, list[LabelledVolume]]] = defaultdict(lambda: defaultdict(list))
        for volume in volumes:
            tree[volume.modality][volume.source].append(volume)
        weights = dict(config.modality_weights)
        self._choices: list[tuple[float, list[LabelledVolume]]] = []
        for modality, sources in tree.items():
            # A dataset counts by the root of its objects: neither one big set nor one lone volume
            # may fill the modality.
            sizes = {s: sum(len(v.objects) for v in vs) ** 0.5 for s, vs in sources.items()}
            for source, members in sources.items():
                share = weights.get(modality, 0.0) * sizes[source] / sum(sizes.values())
                self._choices.append((share, members))
        total = sum(share for share, _ in self._choices)
        if not total:
            raise ValueError(f"no volume of a modality in {sorted(weights)}; found {sorted(tree)}")
        self._shares = [share / total for share, _ in self._choices]

    def draw(self, edge: int) -> Episode:
        """A new episode in a window of ``edge``^3 cells."""
        rng, config = self._rng, self._config
        while True:
            painted = bool(self._label_maps) and rng.random() < config.synthetic
            if painted:
                volume = self._label_maps[rng.integers(len(self._label_maps))]
            else:
                members = self._choices[rng.choice(len(self._choices), p=self._shares)][1]
                volume = members[rng.integers(len(members))]
            episode = self._cut(volume, int(rng.integers(len(volume.objects))), edge)
            if episode is not None:
                return episode

    def _cut(self, volume: LabelledVolume, index: int, edge: int) -> Episode | None:
        """Cut the window of one object; None where too little of it ended up inside."""
        rng, config = self._rng, self._config
        label, start, stop = volume.objects[index]
        order = (0, 1, 2)
        if rng.random() < config.permute:
            order = tuple(int(a) for a in rng.permutation(3))  # type: ignore[assignment]
        labels = volume.labels.permute(order)
        start, stop, spacing_mm = (
            (triple[order[0]], triple[order[1]], triple[order[2]])
            for triple in (start, stop, volume.spacing_mm)
        )
        place = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        low, high, middle = challenge_box(
            (labels[place] == label).cpu().numpy(), self._padding(labels)
        )
        low = tuple(a + s for a, s in zip(low, start, strict=True))  # type: ignore[assignment]
        high = tuple(b + s for b, s in zip(high, start, strict=True))  # type: ignore[assignment]
        middle += start[0]

        boxed = rng.random() >= config.no_box
        window = self._window(low, high, boxed, edge, spacing_mm)
        zoomed = boxed and max(window.size) > 1.25 * edge and rng.random() < config.zoom
        if zoomed:
            window = self._zoom(window, labels[place] == label, start, edge)
        elif not boxed and rng.random() < 0.6:
            window = self._about_click(labels[place] == label, start, spacing_mm, edge)

        cells = _crop(labels, window, edge=False)
        target = resample((cells == label).float()[None], window.shape)[0]
        if volume.image is None:
            image = paint(_nearest(cells, window.shape), rng)
        else:
            image = _crop(volume.image.permute(order), window, edge=True).float()
            image = resample(image[None], window.shape)[0]
        warped = not zoomed and rng.random() < config.warp
        if warped:
            image, target = warp(image, target, rng)
        target = (target > 0.5).float()
        if float(target.sum()) < _SMALLEST_OBJECT:
            return None
        image = change_intensities(image, rng)
        flips = [axis for axis in range(3) if rng.random() < 0.5]
        image, target = image.flip(flips).contiguous(), target.flip(flips).contiguous()

        if warped:
            pad = tuple(p / c for p, c in zip(self._padding(labels), window.cell, strict=True))
            box_low, box_high, box_middle = challenge_box(target.bool().cpu().numpy(), pad)  # type: ignore[arg-type]
        else:
            box_low, box_high = window.to_grid(low), window.to_grid(high)
            box_middle = window.to_grid((middle, 0, 0))[0]
            last = [n - 1 for n in window.shape]
            for axis in flips:
                a, b = last[axis] - box_high[axis], last[axis] - box_low[axis]
                box_low = (*box_low[:axis], a, *box_low[axis + 1 :])
                box_high = (*box_high[:axis], b, *box_high[axis + 1 :])
                if axis == 0:
                    box_middle = last[0] - box_middle
        mask = None
        if zoomed:
            few = [max(6, round(n * rng.uniform(0.3, 0.9))) for n in window.shape]
            mask = perturb_mask(target, (few[0], few[1], few[2]), rng)
        if boxed:
            prompts = WindowPrompts((box_low, box_high), box_middle)
        else:
            goal = target.bool().cpu().numpy()
            first = next_click(np.zeros_like(goal), goal, window.cell, rng)
            assert first is not None
            prompts = WindowPrompts(clicks=(first,))
        rounds = int(rng.integers(1, config.max_rounds + 1))
        return Episode(
            image,
            target,
            prompts,
            mask,
            window.cell,
            rounds,
            volume.source,
            int(zoomed or not boxed),
        )

    def _padding(self, labels: Tensor) -> tuple[float, float, float]:
        """The challenge's random padding: 0..5 px for a 256 px image, proportionally else."""
        y, x = (float(self._rng.integers(0, 6)) * n / 256 for n in labels.shape[1:])
        return 0.0, y, x

    def _window(
        self,
        low: tuple[float, ...],
        high: tuple[float, ...],
        boxed: bool,
        edge: int,
        spacing_mm: tuple[float, float, float],
    ) -> Window:
        """A window about a box: as inference chooses it, with jitter; freer without a box."""
        rng, shape = self._rng, (edge, edge, edge)
        centre = [(a + b + 1) / 2 for a, b in zip(low, high, strict=True)]
        size = [b - a for a, b in zip(low, high, strict=True)]
        if boxed:
            scale = float(rng.uniform(*self._config.box_scale))
            factors, shift = np.exp(rng.normal(0, 0.05, 3)), 0.06
        else:
            scale = float(np.exp(rng.uniform(np.log(1.2), np.log(4.0))))
            factors, shift = np.exp(rng.normal(0, 0.2, 3)), 0.15
        edges = [s * float(f) for s, f in zip(size, factors, strict=True)]
        centre = [
            c + float(rng.uniform(-shift, shift)) * s for c, s in zip(centre, size, strict=True)
        ]
        return window_around(
            [c - e / 2 for c, e in zip(centre, edges, strict=True)],
            [c + e / 2 for c, e in zip(centre, edges, strict=True)],
            shape,
            spacing_mm,
            scale,
        )

    def _about_click(
        self, mask: Tensor, offset: Triple, spacing_mm: tuple[float, float, float], edge: int
    ) -> Window:
        """A cube in millimetres about an object's deepest point: the first look without a box.

        It may be smaller than the object: then the prediction has to reach its border, so that
        inference knows to look further.
        """
        steps = [max(1, n // 48) for n in mask.shape]
        few = mask[:: steps[0], :: steps[1], :: steps[2]].cpu().numpy()
        apart = [n * mm for n, mm in zip(steps, spacing_mm, strict=True)]
        depth = edt.edt(np.ascontiguousarray(few), anisotropy=apart, black_border=True)
        deepest = np.unravel_index(int(depth.argmax()), depth.shape)
        longest = max(n * mm for n, mm in zip(mask.shape, spacing_mm, strict=True))
        cube = longest * float(np.exp(self._rng.uniform(np.log(0.4), np.log(4.0))))
        edges = [cube / mm for mm in spacing_mm]
        centre = [
            i * n + o + float(self._rng.uniform(-0.1, 0.1)) * e
            for i, n, o, e in zip(deepest, steps, offset, edges, strict=True)
        ]
        return window_around(
            [c - e / 2 for c, e in zip(centre, edges, strict=True)],
            [c + e / 2 for c, e in zip(centre, edges, strict=True)],
            (edge, edge, edge),
            spacing_mm,
        )

    def _zoom(self, window: Window, mask: Tensor, offset: Triple, edge: int) -> Window:
        """A finer window about a random surface voxel, as the second pass sees it."""
        rng = self._rng
        inside = F.max_pool3d(-mask.float()[None, None], 3, 1, 1)[0, 0] == -1
        surface = (mask & ~inside).nonzero()
        point = surface[rng.integers(len(surface))].tolist()
        share = float(rng.uniform(0.3, 0.75))
        edges = [round(min(max(s * share, edge), s)) for s in window.size]
        low = [
            round(p + o - e * float(rng.uniform(0.25, 0.75)))
            for p, o, e in zip(point, offset, edges, strict=True)
        ]
        high = [a + e for a, e in zip(low, edges, strict=True)]
        return Window((low[0], low[1], low[2]), (high[0], high[1], high[2]), window.shape)


def _crop(volume: Tensor, window: Window, edge: bool) -> Tensor:
    """The window's voxels of a (D, H, W) tensor; outside: the edge repeated, or zeros."""
    size = (volume.shape[0], volume.shape[1], volume.shape[2])
    inside, place = window.clip(size)
    if not edge:
        cut = volume.new_zeros(window.size)
        cut[place] = volume[inside]
        return cut
    for axis, (a, b, n) in enumerate(zip(window.start, window.stop, size, strict=True)):
        if a < 0 or b > n:
            index = torch.arange(a, b, device=volume.device).clamp_(0, n - 1)
            volume = volume.index_select(axis, index)
        else:
            volume = volume.narrow(axis, a, b - a)
    return volume


def _nearest(labels: Tensor, shape: Triple) -> Tensor:
    """Nearest-neighbour resampling of a (D, H, W) label window."""
    for axis, n in enumerate(shape):
        size = labels.shape[axis]
        index = ((torch.arange(n, device=labels.device) + 0.5) * size / n).long()
        labels = labels.index_select(axis, index)
    return labels
