"""How SAM-Med3D is trained: each step shows new objects and prompts each several times.

The image is encoded once; every prompt is decoded with the clicks and the mask so far, and every
mask has its loss (Wang et al. 2023; the paper's section 2.5: 11 prompts, 2 of them without points).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.model.sam_med3d import SamMed3D
from inference.resampling import resample
from inference.sam_stage import MASK_LOGIT
from training.augmentation import masked_z_scores
from training.click_simulation import next_clicks
from training.config import Config
from training.dataset import Sample, WindowDataset
from training.losses import ABSENT, dice_score, iou_loss, segmentation_loss
from training.scores import Scores

_FILLER = -1  # label of a place where an object has no click


class SamInteraction(nn.Module):
    """SAM-Med3D with the whole interaction as its forward pass, as several processes need it.

    Args:
        model: the network.
        config: of the run.
    """

    def __init__(self, model: SamMed3D, config: Config) -> None:
        """Take the network."""
        super().__init__()
        self.model, self._config = model, config

    def forward(
        self, samples: Sequence[Sample], seeds: Sequence[Sequence[int]], pointless: AbstractSet[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt each object ``config.rounds`` times.

        Args:
            samples: B of them, all with a box or all without.
            seeds: of each one's clicks.
            pointless: the rounds that carry no points.

        Returns:
            (B,) losses, means over the rounds; (rounds, B) Dice; (B, D, H, W) the last mask.
        """
        config, boxed = self._config, samples[0].prompts.box is not None
        images = torch.stack([s.image for s in samples])
        targets = torch.stack([s.target for s in samples])
        truth = targets[:, None].float()
        beyond = ~torch.stack([s.inside for s in samples])[:, None]
        rngs = [np.random.default_rng(seed) for seed in seeds]
        cells = [s.cell for s in samples]
        embedding = self.model.encode_image(masked_z_scores(images)[:, None])
        points, boxes = _first_prompts(samples, images.device)
        masks, losses, dice = None, [], []
        predicted = torch.zeros_like(targets)
        for i in range(config.rounds):
            low, overlap = self.model.decode(
                embedding, None if i in pointless else points, boxes, masks
            )
            low = low.float()
            logits = F.interpolate(low, images.shape[1:], mode="trilinear", align_corners=False)
            logits = logits.masked_fill(beyond, ABSENT)
            losses.append(segmentation_loss(logits, truth, config))
            if config.iou:
                losses[-1] = losses[-1] + config.iou * iou_loss(overlap, logits, truth)
            with torch.no_grad():
                predicted = logits[:, 0] > 0
                dice.append(dice_score(predicted, targets))
                if i + 1 == config.rounds:
                    break
                masks = self._previous(low, predicted)
                chances = [float(rng.random()) for rng in rngs]
                clicks = next_clicks(
                    predicted, targets, cells, chances, config.clicks, config.click_slack
                )
                points = _with_clicks(points, clicks, boxed)
        return torch.stack(losses).mean(0), torch.stack(dice), predicted

    def _previous(self, low: Tensor, predicted: Tensor) -> Tensor:
        """The previous mask as the next prompt: its logits, or hard as inference has it."""
        if self._config.previous_mask == "logits":
            return low.detach()
        d, h, w = low.shape[2:]
        small = resample(predicted.float(), (d, h, w))
        return (MASK_LOGIT * (2 * small - 1))[:, None]


class SamRounds:
    """New objects at every step, prompted as the configuration says.

    Args:
        network: :class:`SamInteraction`, perhaps wrapped for several processes.
        dataset: where objects come from.
        config: of the run.
        slots: of this process's windows among those of all processes, a forward pass a row.
        total: windows of a step of all processes.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: WindowDataset,
        config: Config,
        slots: list[list[int]],
        total: int,
    ) -> None:
        """Nothing is kept from step to step: windows follow from the step's number."""
        self._network, self._dataset, self._config = network, dataset, config
        self._slots, self._total = slots, total
        self.samples: dict[str, Tensor] = {}

    def loss(
        self, part: int, step: int, progress: float, dice: Mapping[str, float], scores: Scores
    ) -> Tensor:
        """One forward pass over new objects: the mean loss of all their rounds.

        Args:
            part: which forward pass of the step.
            step: steps so far.
            progress: share of the run so far (windows do not change with it).
            dice: mean Dice of each dataset so far.
            scores: are added to.
        """
        config = self._config
        numbers = [step * self._total + slot for slot in self._slots[part]]
        # A batch has boxes or it has none, and points or none, the same in every process.
        common = np.random.default_rng((config.seed, 4, step, part))
        boxed = bool(common.random() >= config.no_box)
        pointless = _pointless(config, common)
        # Windows are single precision, whatever the network computes in.
        with torch.autocast(self._dataset.store.device.type, enabled=False):
            samples = self._dataset.draw(numbers, config.sam.image_size, boxed, dice)
        seeds = [(config.seed, 5, number) for number in numbers]
        losses, found, predicted = self._network(samples, seeds, pointless)
        for i, row in enumerate(found.tolist()):
            for sample, score in zip(samples, row, strict=True):
                scores.add(sample.source, boxed, i, score)
        self.samples = {
            "image": torch.stack([s.image for s in samples]),
            "target": torch.stack([s.target for s in samples]),
            "mask": predicted,
        }
        mean: Tensor = losses.mean()
        return mean

    def state(self) -> dict[str, int]:
        """Nothing: the step's number is enough."""
        return {}

    def load(self, states: list[dict[str, int]]) -> None:
        """Nothing to go on from."""


def _pointless(config: Config, rng: np.random.Generator) -> set[int]:
    """Rounds without points: the last one, and others after the second."""
    count, last = config.pointless_rounds, config.rounds - 1
    if not count:
        return set()
    others = rng.permutation(np.arange(2, last))[: count - 1]
    return {last, *(int(i) for i in others)}


def _first_prompts(
    samples: Sequence[Sample], device: torch.device
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Points of the first round, and boxes: the first click, or the box and its centre."""
    if samples[0].prompts.box is None:
        places = [[s.prompts.clicks[0][0]] for s in samples]
        labels = [[int(s.prompts.clicks[0][1])] for s in samples]
        return (torch.tensor(places, device=device), torch.tensor(labels, device=device)), None
    corners = []
    for sample in samples:
        assert sample.prompts.box is not None
        low, high = sample.prompts.box
        half = [0.5 / cell for cell in sample.cell]  # faces lie half a voxel outside
        first = [a + h for a, h in zip(low, half, strict=True)]
        corners.append([first, [b - h for b, h in zip(high, half, strict=True)]])
    boxes = torch.tensor(corners, device=device)
    ones = torch.ones(len(samples), 1, dtype=torch.int64, device=device)
    return (boxes.mean(1, keepdim=True), ones), boxes.flatten(1)


def _with_clicks(
    points: tuple[Tensor, Tensor],
    clicks: Sequence[tuple[tuple[float, float, float], bool] | None],
    boxed: bool,
) -> tuple[Tensor, Tensor]:
    """The points with one click more each; a box's centre counts until the first positive one."""
    places, labels = points
    new = [(0.0, 0.0, 0.0) if c is None else c[0] for c in clicks]
    kinds = torch.tensor(
        [_FILLER if c is None else int(c[1]) for c in clicks], device=labels.device
    )
    labels = torch.cat([labels, kinds[:, None]], 1)
    if boxed:
        labels[kinds == 1, 0] = _FILLER
    return torch.cat([places, torch.tensor(new, device=places.device)[:, None]], 1), labels
