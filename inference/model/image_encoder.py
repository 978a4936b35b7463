"""The image encoder of SAM-Med3D: a 3D vision transformer with windowed attention."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.model.layers import LayerNorm3d, Linear, MLPBlock
from inference.model.relative_position import Axes, gather_offsets, relative_bias


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping cubes: (B, 1, D, H, W) -> (B, D/p, H/p, W/p, C)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, width, kernel_size=patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> (B, D/p, H/p, W/p, C)."""
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        # In float32 at any precision: oneDNN's bfloat16 kernel for a stride of 16 takes 30 times
        # as long, and the voxels keep their precision.
        with torch.autocast(image.device.type, enabled=False):
            x = F.conv3d(image.float(), weight.float(), bias.float(), stride=self.proj.stride)
        return x.to(weight.dtype).movedim(1, -1)


class Attention(nn.Module):
    """Multi-head self-attention with relative positions, over windows or over the whole grid.

    A windowed block of Segment Anything pads the grid with zero tokens to whole windows and lets
    real tokens attend to the padding. The same function is computed here without a padded token:
    every padded key is the key bias and every padded value the value bias, so one more key stands
    for all of them, with the log of their mass as its bias (``relative_position.py``).

    Args:
        width: channels C.
        heads: attention heads; divides ``width``.
        size: edge of the attention window in tokens; that of the grid where attention is global.
        axes: along which axes relative positions are added.
    """

    def __init__(self, width: int, heads: int, size: int, axes: Axes) -> None:
        super().__init__()
        self.heads = heads
        self.size = size
        self.axes: Axes = axes
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.rel_pos_d = nn.Parameter(torch.zeros(2 * size - 1, width // heads))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) normalised tokens -> the same shape."""
        qkv = self.qkv(x)
        tables = (
            gather_offsets(self.rel_pos_d.float()),
            gather_offsets(self.rel_pos_h.float()),
            gather_offsets(self.rel_pos_w.float()),
        )
        out = qkv.new_empty(x.shape)
        for corner in _windows(x.shape[1:4], self.size):
            windows, counts = _split(qkv[:, *corner], self.size)
            out[:, *corner] = _join(self._attend(windows, tables), counts)
        return self.proj(out)  # type: ignore[no-any-return]

    def _attend(self, qkv: Tensor, tables: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Attend inside windows that are all padded alike: (N, D, H, W, 3 C) -> (N, D, H, W, C)."""
        N, D, H, W, _ = qkv.shape
        # (3, N, heads, D, H, W, C / heads)
        query, key, value = qkv.reshape(N, D, H, W, 3, self.heads, -1).permute(4, 0, 5, 1, 2, 3, 6)
        padded = self.qkv.bias.view(3, self.heads, -1)
        with torch.autocast(qkv.device.type, enabled=False):
            bias, mass = relative_bias(query.float(), padded[0].float(), tables, self.axes)
        query, key, value = (t.flatten(2, 4) for t in (query, key, value))
        if mass is not None:
            more = padded[1:, None, :, None].to(key.dtype).expand(-1, N, -1, -1, -1)
            key = torch.cat([key, more[0]], dim=2)
            value = torch.cat([value, more[1]], dim=2)
            bias = torch.cat([bias, mass], dim=-1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return out.transpose(1, 2).reshape(N, D, H, W, -1)


def _windows(grid: tuple[int, ...], size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a grid into at most eight parts, each of windows with the same number of real tokens.

    Windows start at the origin, so along each axis all are full but perhaps the last.
    """
    axes = []
    for length in grid:
        full = length - length % size
        parts = (slice(0, full), slice(full, length))
        axes.append([part for part in parts if part.start < part.stop])
    yield from ((d, h, w) for d, h, w in product(*axes))


def _split(x: Tensor, size: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Cut (B, D, H, W, C) into windows (N, d, h, w, C); also B and the windows along each axis."""
    B, D, H, W, C = x.shape
    d, h, w = min(D, size), min(H, size), min(W, size)
    counts = (B, D // d, H // h, W // w)
    x = x.reshape(B, counts[1], d, counts[2], h, counts[3], w, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, d, h, w, C), counts


def _join(windows: Tensor, counts: tuple[int, int, int, int]) -> Tensor:
    """Undo ``_split``: (N, d, h, w, C) -> (B, D, H, W, C)."""
    B, nd, nh, nw = counts
    _, d, h, w, C = windows.shape
    x = windows.reshape(B, nd, nh, nw, d, h, w, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, nd * d, nh * h, nw * w, C)


class Block(nn.Module):
    """A pre-norm transformer block over a grid of tokens."""

    def __init__(self, width: int, heads: int, size: int, axes: Axes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, size, axes)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(width, 4 * width, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ImageEncoder(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) in 3D with the neck of Segment Anything.

    Args:
        image_size: edge S of the cubic input in voxels, a multiple of ``patch``.
        patch: edge of a patch in voxels.
        width: channels of the transformer.
        depth: number of blocks.
        heads: attention heads a block.
        global_blocks: blocks that attend over the whole grid; the others over windows.
        window: edge of a window in tokens.
        out_channels: channels of the embedding.
        axes: along which axes relative positions are added.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        global_blocks: Collection[int],
        window: int,
        out_channels: int,
        axes: Axes,
    ) -> None:
        super().__init__()
        grid = image_size // patch
        self.image_size = image_size
        self.patch_embed = PatchEmbed(patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, grid, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, grid if i in global_blocks else window, axes) for i in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv3d(width, out_channels, kernel_size=1, bias=False),
            LayerNorm3d(out_channels),
            nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            LayerNorm3d(out_channels),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Embed windows of an image.

        Args:
            image: (B, 1, S, S, S), z-normalised over its voxels above 0.

        Returns:
            The embedding (B, out_channels, S/p, S/p, S/p).

        Raises:
            ValueError: the image has another shape.
        """
        S = self.image_size
        if image.ndim != 5 or tuple(image.shape[1:]) != (1, S, S, S):
            raise ValueError(
                f"an image of shape {tuple(image.shape)}: this encoder takes (B, 1, {S}, {S}, {S})"
            )
        x = self.patch_embed(image) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.movedim(-1, 1))  # type: ignore[no-any-return]
