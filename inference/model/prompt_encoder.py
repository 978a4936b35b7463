"""The prompt encoder of SAM-Med3D: points, boxes and a previous mask become embeddings."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

from inference.model.layers import LayerNorm3d

#: How the dense grid of positions lies: as public checkpoints were trained, or like the points.
DenseGrid = Literal["public", "aligned"]

Points = tuple[Tensor, Tensor]

_NOT_A_POINT = -1


class PositionEncoding(nn.Module):
    """Random Fourier features (Tancik et al. 2020) of positions in the unit cube."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, frequencies))

    def forward(self, position: Tensor) -> Tensor:
        """(..., 3) in 0..1 -> (..., 3 * frequencies): sine, cosine, sine, in float32.

        The phase runs over many turns, so it is never computed in half precision.
        """
        matrix = self.positional_encoding_gaussian_matrix.float()
        with torch.autocast(position.device.type, enabled=False):
            phase = 2 * math.pi * ((2 * position.float() - 1) @ matrix)
        sine = phase.sin()
        return torch.cat([sine, phase.cos(), sine], dim=-1)


class PromptEncoder(nn.Module):
    """Embeds the prompts of an object for the mask decoder.

    Args:
        width: channels C of every embedding, a multiple of 3.
        image_size: edge S of the window in voxels.
        grid: edge g of the image embedding in tokens; a previous mask has edge 4 g.
        mask_channels: channels of the mask branch, a multiple of 4.
        dense_grid: how the dense grid of positions lies.
        boxes: whether there are embeddings of the corners of boxes.
    """

    def __init__(
        self,
        *,
        width: int,
        image_size: int,
        grid: int,
        mask_channels: int,
        dense_grid: DenseGrid,
        boxes: bool,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid = grid
        self.dense_grid: DenseGrid = dense_grid
        self.pe_layer = PositionEncoding(width // 3)
        # Background point, foreground point, first and last corner of a box.
        kinds = 4 if boxes else 2
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(kinds))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, mask_channels // 4, kernel_size=2, stride=2),
            LayerNorm3d(mask_channels // 4),
            nn.GELU(),
            nn.Conv3d(mask_channels // 4, mask_channels, kernel_size=2, stride=2),
            LayerNorm3d(mask_channels),
            nn.GELU(),
            nn.Conv3d(mask_channels, width, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, width)

    def get_dense_pe(self) -> Tensor:
        """Positions of the image embedding's tokens, (1, C, g, g, g).

        A point at index (a, b, c) of the window is encoded as the triple (a, b, c). The token at
        (a, b, c) of the dense grid is encoded as (b, a, c) where ``dense_grid`` is ``"public"``:
        the checkpoints were trained so.
        """
        device = self.no_mask_embed.weight.device
        centre = (torch.arange(self.grid, device=device) + 0.5) / self.grid
        position = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij"), dim=-1)
        if self.dense_grid == "public":
            position = position.transpose(0, 1)
        encoding: Tensor = self.pe_layer(position)
        return encoding.movedim(-1, 0)[None].to(self.no_mask_embed.weight.dtype)

    def forward(
        self, points: Points | None = None, boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed the prompts of B objects; each kind may be absent for all of them.

        Args:
            points: coordinates (B, N, 3) and labels (B, N). A coordinate is a voxel's index in the
                window tensor, one component an axis in the tensor's own order. A label is 1 for
                the object, 0 for the background, -1 for a filler where objects of a batch have
                fewer points than others. One filler is appended where there are no boxes, as in
                training.
            boxes: (B, 6) first and last voxel of the object along each axis, both inside it:
                (a0, b0, c0, a1, b1, c1) in the order of the coordinates.
            masks: (B, 1, 4 g, 4 g, 4 g) logits of a previous mask.

        Returns:
            Sparse embeddings (B, number of points and corners, C) and dense embeddings
            (B, C, g, g, g). With no prompt at all, B is 1 and the sparse ones are empty.

        Raises:
            ValueError: a shape or a label is not as said.
        """
        B = self._batch(points, boxes, masks)
        no_mask = self.no_mask_embed.weight
        sparse = no_mask.new_empty(B, 0, no_mask.shape[1])
        if points is not None:
            sparse = self._embed_points(*points, filler=boxes is None)
        if boxes is not None:
            sparse = torch.cat([sparse, self._embed_boxes(boxes)], dim=1)
        if masks is None:
            dense = no_mask.reshape(1, -1, 1, 1, 1).expand(B, -1, *3 * (self.grid,))
        else:
            dense = self.mask_downscaling(masks)
        return sparse, dense

    def _batch(self, points: Points | None, boxes: Tensor | None, masks: Tensor | None) -> int:
        """Check the shapes of the prompts and return their number of objects."""
        edge = 4 * self.grid
        sizes = set()
        if points is not None:
            coords, labels = points
            if coords.ndim != 3 or coords.shape[2] != 3 or labels.shape != coords.shape[:2]:
                raise ValueError(
                    f"points of shape {tuple(coords.shape)} with labels of shape "
                    f"{tuple(labels.shape)}: they must be (B, N, 3) and (B, N)"
                )
            sizes.add(coords.shape[0])
        if boxes is not None:
            if len(self.point_embeddings) < 4:
                raise ValueError("a box: this network has learnt points and masks only")
            if boxes.ndim != 2 or boxes.shape[1] != 6:
                raise ValueError(f"boxes of shape {tuple(boxes.shape)}: they must be (B, 6)")
            sizes.add(boxes.shape[0])
        if masks is not None:
            if masks.ndim != 5 or tuple(masks.shape[1:]) != (1, edge, edge, edge):
                raise ValueError(
                    f"masks of shape {tuple(masks.shape)}: they must be "
                    f"(B, 1, {edge}, {edge}, {edge})"
                )
            sizes.add(masks.shape[0])
        if len(sizes) > 1:
            raise ValueError(
                f"points, boxes and masks disagree: prompts for {sorted(sizes)} objects"
            )
        return sizes.pop() if sizes else 1

    def _encode(self, coords: Tensor) -> Tensor:
        """Encode the centres of voxels: (..., 3) indices -> (..., C)."""
        encoding: Tensor = self.pe_layer((coords.float() + 0.5) / self.image_size)
        return encoding.to(self.no_mask_embed.weight.dtype)

    def _embed_points(self, coords: Tensor, labels: Tensor, filler: bool) -> Tensor:
        """(B, N, 3), (B, N) -> (B, N or N + 1, C)."""
        if bool(((labels != 0) & (labels != 1) & (labels != _NOT_A_POINT)).any()):
            raise ValueError(
                f"point labels {sorted(set(labels.flatten().tolist()))}: they must be 1 (object), "
                "0 (background) or -1 (filler)"
            )
        background, foreground, *_ = self._kinds()
        kind = labels[..., None]
        embedding = self._encode(coords) + torch.where(kind == 1, foreground, background)
        not_a_point = self.not_a_point_embed.weight
        embedding = torch.where(kind == _NOT_A_POINT, not_a_point, embedding)
        if filler:
            more = not_a_point.expand(embedding.shape[0], 1, -1)
            embedding = torch.cat([embedding, more], dim=1)
        return embedding

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        """(B, 6) -> (B, 2, C): its first and its last corner."""
        return self._encode(boxes.reshape(-1, 2, 3)) + torch.cat(self._kinds()[2:])

    def _kinds(self) -> list[Tensor]:
        """Embeddings of a background point, a foreground point and the corners: (1, C) each."""
        return [cast(nn.Embedding, kind).weight for kind in self.point_embeddings]
