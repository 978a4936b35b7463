"""Layers that the parts of SAM-Med3D share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
# None in a build without it.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """``nn.Linear``, on oneDNN's float32 kernel where a CPU computes without gradients.

    PyTorch itself takes MKL's, which AMD processors run at half that speed (measured on Zen 5,
    512 tokens, one thread: 95 against 210 GFLOP/s). PyTorch's compiler calls the same operator.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if (
            _ONEDNN_LINEAR is not None
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        ):
            return _ONEDNN_LINEAR(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return super().forward(x)


class Conv3d(nn.Conv3d):
    """``nn.Conv3d``, on oneDNN's kernel wherever a CPU computes in float32.

    Padding is with zeros. PyTorch itself lays a single small window out as a matrix first, which
    takes up to ten times as long (1x32x24^3, 3^3, two threads: 41 against 5 ms).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, out, d, h, w)."""
        if (
            _ONEDNN
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not isinstance(self.padding, str)
        ):
            return torch.mkldnn_convolution(
                x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
            )
        return super().forward(x)


class LayerNorm3d(nn.Module):
    """Layer normalisation over the channels of a (B, C, D, H, W) tensor, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> the same shape."""
        last = x.movedim(1, -1)
        last = F.layer_norm(last, self.weight.shape, self.weight, self.bias, eps=1e-6)
        return last.movedim(-1, 1)


class MLPBlock(nn.Module):
    """The two-layer perceptron of a transformer block: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.lin1 = Linear(width, hidden)
        self.lin2 = Linear(hidden, width)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = self.act(self.lin1(x))
        return self.lin2(x)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """A perceptron with ReLU between its layers; ``widths`` runs from input to output."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) -> (..., widths[-1])."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)  # type: ignore[no-any-return]
