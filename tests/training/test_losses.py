"""Losses: right for the truth, wrong for its opposite, terms as their formulas say."""

from __future__ import annotations

import pytest
import torch
from scipy import ndimage

from tests.training.balls import config
from training.losses import boundary_band, dice_score, focal_loss, iou_loss, segmentation_loss


def _blobs() -> torch.Tensor:
    target = torch.zeros(2, 1, 12, 14, 16)
    target[0, 0, 3:9, 4:10, 5:12] = 1
    target[1, 0, 5:, :7, 8:] = 1
    return target


@pytest.mark.parametrize("terms", [{}, {"focal": 1.0}, {"boundary": 1.0}, {"dice": 0.0}])
def test_the_loss_is_small_for_the_truth_and_large_for_its_opposite(
    terms: dict[str, float],
) -> None:
    target = _blobs()
    logits = 20 * (2 * target - 1)
    settings = config(**terms)
    right = segmentation_loss(logits, target, settings)
    assert right.shape == (2,) and float(right.max()) < 0.01
    assert float(segmentation_loss(-logits, target, settings).min()) > 10


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    target = _blobs()
    logits = torch.randn(target.shape)
    entropy = segmentation_loss(logits, target, config(dice=0.0))
    torch.testing.assert_close(focal_loss(logits, target, 0.0), entropy)
    assert (focal_loss(logits, target, 2.0) < entropy).all()


def test_the_boundary_band_is_two_cells_wide_on_either_side() -> None:
    target = _blobs()
    box = ndimage.generate_binary_structure(3, 3)
    for mask, band in zip(target[:, 0].bool().numpy(), boundary_band(target)[:, 0], strict=True):
        wide = ndimage.binary_dilation(mask, box, 2)
        thin = ndimage.binary_erosion(mask, box, 2, border_value=1)
        assert torch.equal(band.bool(), torch.from_numpy(wide & ~thin))


def test_the_overlap_head_is_taught_the_true_overlap() -> None:
    target = _blobs()
    logits = torch.full_like(target, -5.0)
    logits[0, 0, 3:9, 4:10, 5:8] = 5  # 3 of 7 columns
    guess = torch.tensor([[3 / 7], [0.25]])
    torch.testing.assert_close(iou_loss(guess, logits, target), torch.tensor([0.0, 0.0625]))


def test_dice_of_masks() -> None:
    target = _blobs()[:, 0].bool()
    mask = target.clone()
    mask[0, 3:6] = False
    torch.testing.assert_close(dice_score(mask, target), torch.tensor([2 / 3, 1.0]))
    nothing = torch.zeros_like(target)
    assert dice_score(nothing, nothing).tolist() == [1.0, 1.0]
