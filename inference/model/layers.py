"""Layers that the parts of SAM-Med3D share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm3d(nn.Module):
    """Layer normalisation over the channels of a (B, C, D, H, W) tensor, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> the same shape."""
        return self.over_last(x.movedim(1, -1)).movedim(-1, 1)

    def over_last(self, x: Tensor) -> Tensor:
        """The same for a tensor whose channels are the last axis: (..., C) -> (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-6)


class MLPBlock(nn.Module):
    """The two-layer perceptron of a transformer block: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = self.act(self.lin1(x))
        return self.lin2(x)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """A perceptron with ReLU between its layers; ``widths`` runs from input to output."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) -> (..., widths[-1])."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)  # type: ignore[no-any-return]
