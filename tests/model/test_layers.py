"""Layers against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from inference.model.layers import MLP, Conv3d, LayerNorm3d, Linear


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 4, 5, 24), (1, 24), (0, 24)])
def test_linear_without_gradients(shape: tuple[int, ...]) -> None:
    layer = Linear(24, 7)
    x = torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        result = layer(x)
        strided = layer(x.transpose(0, -2).contiguous().transpose(0, -2))
    assert result.shape == expected.shape
    assert torch.allclose(result, expected, atol=1e-6)
    assert torch.allclose(strided, expected, atol=1e-6)


def test_linear_elsewhere_is_the_usual_one() -> None:
    layer = Linear(24, 7)
    x = torch.randn(5, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(7, -1), atol=1e-5)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("batch", "edge", "stride"), [(1, 24, 1), (3, 6, 1), (1, 8, 2)])
def test_convolution_is_the_usual_one(batch: int, edge: int, stride: int) -> None:
    layer = Conv3d(16, 8, 3, padding=1, stride=stride)
    x = torch.randn(batch, 16, edge, edge, edge, requires_grad=True)
    expected = F.conv3d(x, layer.weight, layer.bias, padding=1, stride=stride)
    gradient = torch.autograd.grad(expected.square().sum(), [x, layer.weight])
    result = layer(x)
    found = torch.autograd.grad(result.square().sum(), [x, layer.weight])
    for a, b in zip(found, gradient, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
    with torch.inference_mode():
        order = layer.to(memory_format=torch.channels_last_3d)
        assert torch.allclose(order(x), expected, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64


def test_layer_norm_over_channels() -> None:
    layer = LayerNorm3d(6)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 3, 4, 5) * 3 + 1
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt()
    expected = expected * layer.weight[:, None, None, None] + layer.bias[:, None, None, None]
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_mlp_has_no_activation_at_its_end() -> None:
    mlp = MLP(4, 8, 3)
    first, last = mlp.layers
    x = torch.randn(10, 4)
    assert torch.allclose(mlp(x), last(first(x).clamp(min=0)), atol=1e-6)
    assert (mlp(x) < 0).any()
