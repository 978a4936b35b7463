"""The image encoder against a literal one that keeps every padded token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from inference.model.image_encoder import Attention, ImageEncoder
from inference.model.relative_position import Axes, gather_offsets
from inference.model.sam_med3d import build_sam_med3d
from tests.model.padded_attention import padded_attention, padded_encoder

AXES: list[Axes] = ["public", "aligned"]

# Grid, window: smaller than the window, equal to it, one window and a rest, several and a rest;
# one-token axes; rests that differ along the axes.
GRIDS = [
    ((4, 4, 4), 7),
    ((3, 5, 2), 6),
    ((1, 1, 1), 3),
    ((1, 4, 3), 4),
    ((4, 1, 4), 4),
    ((4, 4, 1), 4),
    ((4, 4, 4), 4),
    ((5, 5, 5), 4),
    ((3, 4, 7), 3),
    ((6, 3, 4), 3),
    ((5, 7, 8), 3),
]


def randomise(module: nn.Module, scale: float = 1.0) -> None:
    """Give every parameter, zeros at the start too, a value that matters."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=scale / parameter.shape[-1] ** 0.5)


def attention(size: int, axes: Axes, scale: float = 1.0) -> Attention:
    module = Attention(width=24, heads=3, size=size, axes=axes)
    randomise(module, scale)
    nn.init.normal_(module.qkv.bias, std=scale)
    for table in (module.rel_pos_d, module.rel_pos_h, module.rel_pos_w):
        nn.init.normal_(table, std=scale)
    return module


def small_encoder(axes: Axes) -> ImageEncoder:
    encoder = ImageEncoder(
        image_size=20,
        patch=4,
        width=24,
        depth=4,
        heads=2,
        global_blocks=(1,),
        window=3,
        out_channels=16,
        axes=axes,
    )
    randomise(encoder)
    return encoder


def test_table_is_laid_out_by_offset() -> None:
    table = torch.arange(-2, 3)[:, None].float()  # row r holds the offset r - 2
    assert gather_offsets(table)[..., 0].tolist() == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_attention_equals_the_padded_one(grid: tuple[int, int, int], size: int, axes: Axes) -> None:
    module = attention(size, axes)
    x = torch.randn(2, *grid, 24)
    with torch.no_grad():
        difference = module(x) - padded_attention(module, x)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("axes", AXES)
def test_padding_matters_and_so_do_the_axes(axes: Axes) -> None:
    """The oracle is sensitive to what is compared: no padding, or other axes, is far off."""
    module = attention(6, axes)
    x = torch.randn(1, 4, 4, 4, 24)
    with torch.no_grad():
        expected = module(x)
        other = attention(6, "aligned" if axes == "public" else "public")
        other.load_state_dict(module.state_dict())
        assert (other(x) - expected).abs().max() > 1e-2
        unpadded = Attention(24, 3, 4, axes)
        state = module.state_dict()
        for name in ("rel_pos_d", "rel_pos_h", "rel_pos_w"):
            state[name] = state[name][2:-2]
        unpadded.load_state_dict(state)
        assert (unpadded(x) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("axes", AXES)
def test_gradients_equal_the_padded_ones(axes: Axes) -> None:
    module = attention(4, axes)
    x = torch.randn(1, 3, 5, 4, 24, requires_grad=True)
    weight = torch.randn(1, 3, 5, 4, 24)
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad((module(x) * weight).sum(), inputs)
    theirs = torch.autograd.grad((padded_attention(module, x) * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("axes", AXES)
def test_large_logits_do_not_overflow(axes: Axes) -> None:
    """Relative positions of hundreds: exponentials overflow float32, their logarithms do not."""
    module = attention(6, axes, scale=6.0)
    x = torch.randn(1, 4, 4, 4, 24)
    with torch.no_grad():
        ours, theirs = module.double()(x.double()), padded_attention(module, x.double())
    assert torch.isfinite(ours).all()
    # The bias is computed in float32, at a magnitude of a thousand.
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_close(axes: Axes, autocast: bool) -> None:
    module = attention(6, axes)
    x = torch.randn(1, 4, 4, 4, 24)
    with torch.no_grad():
        expected = padded_attention(module, x)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                result = module(x)
        else:
            result = module.bfloat16()(x.bfloat16())
    assert result.dtype == torch.bfloat16
    error = (result.float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error < 0.03  # bfloat16 keeps 8 bits: 0.4 % a rounding, several in a row


@pytest.mark.parametrize("axes", AXES)
def test_encoder_equals_the_padded_one(axes: Axes) -> None:
    """A grid of 5^3 in windows of 3: eight kinds of window; and one global block."""
    encoder = small_encoder(axes)
    image = torch.randn(2, 1, 20, 20, 20)
    with torch.no_grad():
        result, expected = encoder(image), padded_encoder(encoder, image)
    assert result.shape == (2, 16, 5, 5, 5)
    assert (result - expected).abs().max() < 1e-4


def test_a_batch_is_its_images() -> None:
    encoder = small_encoder("public")
    image = torch.randn(3, 1, 20, 20, 20)
    with torch.no_grad():
        one_by_one = torch.cat([encoder(part) for part in image.split(1)])
        assert (encoder(image) - one_by_one).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["autocast", "half weights"])
def test_encoder_in_bfloat16(precision: str) -> None:
    encoder = small_encoder("public")
    image = torch.randn(1, 1, 20, 20, 20)
    with torch.no_grad():
        expected = encoder(image)
        if precision == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                result = encoder(image)
        else:
            result = encoder.bfloat16()(image.bfloat16())
    error = (result.float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error < 0.05


def test_operations_of_the_full_size() -> None:
    """3.5 times fewer operations than with padding, counted without computing anything."""
    with FakeTensorMode():
        encoder = build_sam_med3d("vit_b_768").image_encoder
        image = torch.empty(1, 1, 128, 128, 128)
        with FlopCounterMode(display=False) as ours:
            encoder(image)
        with FlopCounterMode(display=False) as padded:
            padded_encoder(encoder, image)
    assert ours.get_total_flops() < 106e9
    assert padded.get_total_flops() > 3.5 * ours.get_total_flops()


@pytest.mark.parametrize("shape", [(1, 1, 20, 20, 16), (1, 20, 20, 20), (1, 2, 20, 20, 20)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(B, 1, 20, 20, 20\)"):
        small_encoder("public")(torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("axes", AXES)
def test_attention_on_a_gpu(axes: Axes) -> None:
    module = attention(6, axes)
    x = torch.randn(2, 4, 5, 6, 24)
    with torch.no_grad():
        expected = module(x)
        module, x = module.cuda(), x.cuda()
        assert (module(x).cpu() - expected).abs().max() < 1e-4
        with torch.autocast("cuda", torch.bfloat16):
            result = module(x).float().cpu()
    assert (result - expected).pow(2).mean().sqrt() / expected.std() < 0.03
