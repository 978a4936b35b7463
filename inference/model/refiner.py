"""The refiner: a prompt-conditioned residual 3D network at window resolution.

It sees the image, the prompts, the previous mask, an intensity-likelihood map and, in a second
pass, the logits of the first one as input channels, after nnInteractive (Isensee et al. 2025), and
corrects the likelihood map instead of starting from nothing: with an untrained head its output is
the training-free segmentation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.model.layers import Conv3d
from inference.model.weights import NetworkConfig, load_state, read_weights, split_prefix

_GROUPS = 8  # of the normalisations
#: Input channels in order; prompts.py makes them.
CHANNELS = (
    "image",
    "coarse_logits",
    "previous_mask",
    "likelihood",
    "ellipsoid",
    "box",
    "middle_slice",
    "positive_clicks",
    "negative_clicks",
    "others",
    "larger_boxes",
)
_LIKELIHOOD = CHANNELS.index("likelihood")
_PREVIOUS = CHANNELS.index("previous_mask")
_SHAPE = CHANNELS.index("ellipsoid")
_COARSE = CHANNELS.index("coarse_logits")


@dataclasses.dataclass(frozen=True)
class RefinerConfig(NetworkConfig):
    """Shape of the refiner, stored in the weights file's metadata.

    Attributes:
        channels: width of each resolution level, finest (half the window's resolution) first.
        blocks: residual blocks of each level on the way down; one each on the way up.
        window: edge of the training window in grid cells; any multiple of ``stride`` runs.
        coarse: whether training showed it the first pass's logits in the second one; else their
            channel must stay zero.
        without: names of :data:`CHANNELS` that it is blind to (to see what they are worth).

    Raises:
        ValueError: ``without`` names no channel, or sizes are none a network can have.
    """

    channels: tuple[int, ...] = (32, 64, 96, 128)
    blocks: tuple[int, ...] = (2, 2, 6, 6)
    window: int = 64
    coarse: bool = False
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse names that are none, and sizes that would take all memory and time."""
        sizes = (*self.channels, *self.blocks, self.window)
        if not (
            all(type(n) is int for n in sizes)
            and 0 < len(self.channels) == len(self.blocks) < 8
            and all(0 < n <= 4096 and n % _GROUPS == 0 for n in self.channels)
            and all(0 < n <= 64 for n in self.blocks)
            and 0 < self.window <= 512
            and self.window % self.stride == 0
        ):
            raise ValueError(
                f"channels {self.channels}, blocks {self.blocks}, window {self.window}; accepted: "
                f"as many blocks as channels, these multiples of {_GROUPS}, the window of the "
                f"stride, {2 ** len(self.channels)}, up to 512"
            )
        unknown = sorted(set(self.without) - set(CHANNELS))
        if unknown:
            raise ValueError(f"without is {unknown}; accepted: {', '.join(CHANNELS)}")

    @property
    def stride(self) -> int:
        """Every window edge must be a multiple of this."""
        return int(2 ** len(self.channels))


class ResidualBlock(nn.Module):
    """Pre-activation residual block: twice GroupNorm, SiLU, 3^3 convolution."""

    def __init__(self, channels: int) -> None:
        """Make a block whose second convolution starts at zero, so that it starts as identity."""
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv1 = Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, channels)
        self.conv2 = Conv3d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> the same shape."""
        y = self.conv2(_activated(self.norm2, self.conv1(_activated(self.norm1, x))))
        return x + y if torch.is_grad_enabled() else y.add_(x)  # type: ignore[no-any-return]


def _activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU of the normalised x; in place where no gradient needs what lies between."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def unfold(x: Tensor) -> Tensor:
    """(B, 8C, d, h, w) -> (B, C, 2d, 2h, 2w): channels become a 2^3 cube of cells each."""
    B, C, D, H, W = x.shape
    x = x.reshape(B, C // 8, 2, 2, 2, D, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, C // 8, 2 * D, 2 * H, 2 * W)


class Refiner(nn.Module):
    """Residual U-Net over prompt channels.

    Convolutions at full resolution with few channels starve a CPU, so the first layer takes 2^3
    cells at a time and the last one unfolds its channels to cells.
    """

    def __init__(self, config: RefinerConfig | None = None) -> None:
        """Make an untrained refiner: it returns a blend of likelihood, mask and shape prior."""
        super().__init__()
        self.config = config or RefinerConfig()
        widths, blocks = self.config.channels, self.config.blocks
        self.stem = Conv3d(len(CHANNELS), widths[0], 2, stride=2)
        self.down = nn.ModuleList(Conv3d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.encoder = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(w) for _ in range(n)))
            for w, n in zip(widths, blocks, strict=True)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths)
        )
        self.decoder = nn.ModuleList(ResidualBlock(w) for w in widths[:-1])
        self.norm = nn.GroupNorm(_GROUPS, widths[0])
        self.head = Conv3d(widths[0], 8, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        #: weights in the output's starting point of likelihood map, previous mask, shape prior and
        #: the first pass's logits
        self.base = nn.Parameter(torch.tensor([2.0, 1.0, 2.0, 1.0]))

    def forward(self, channels: Tensor) -> Tensor:
        """Segment windows.

        Args:
            channels: (B, 11, D, H, W) in the order of :data:`CHANNELS`; D, H, W multiples of
                ``config.stride``.

        Returns:
            (B, 1, D, H, W) float32 logits.

        Raises:
            ValueError: for another number of channels or another size.
        """
        stride = self.config.stride
        if channels.ndim != 5 or channels.shape[1] != len(CHANNELS):
            raise ValueError(
                f"refiner received {tuple(channels.shape)}; accepted: (B, {len(CHANNELS)}, D, H, W)"
            )
        if any(n % stride for n in channels.shape[2:]):
            raise ValueError(
                f"refiner received {tuple(channels.shape[2:])}; accepted: multiples of {stride}"
            )
        if self.config.without:
            blind = channels.new_tensor([name not in self.config.without for name in CHANNELS])
            channels = channels * blind[:, None, None, None]
        x = self.stem(channels)
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = self.down[level - 1](x)
            x = blocks(x)
            skips.append(x)
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](self.up[level](x) + skips[level])
        residual = unfold(self.head(_activated(self.norm, x))).float()
        base = self.base.float()
        return (
            residual
            + base[0] * channels[:, _LIKELIHOOD : _LIKELIHOOD + 1].float()
            + base[1] * channels[:, _PREVIOUS : _PREVIOUS + 1].float()
            + base[2] * channels[:, _SHAPE : _SHAPE + 1].float()
            + base[3] * channels[:, _COARSE : _COARSE + 1].float()
        )


def with_all_channels(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A refiner's tensors, blind to the channels that there were not yet when it was trained.

    Channels are only ever added at the end of :data:`CHANNELS`, and their weights in the output's
    starting point at the end of ``base``; weights of zero ignore them.
    """
    completed = dict(state)
    stem = completed.get("stem.weight")
    if stem is not None and stem.ndim == 5 and stem.shape[1] < len(CHANNELS):
        lacking = len(CHANNELS) - stem.shape[1]
        completed["stem.weight"] = F.pad(stem, (0, 0, 0, 0, 0, 0, 0, lacking))
    base = completed.get("base")
    if base is not None and base.shape == (3,):
        completed["base"] = F.pad(base, (0, 1))
    return completed


def load_refiners(path: Path) -> tuple[Refiner, Refiner | None]:
    """Load the refiners of a bundle, in evaluation mode, reading and verifying it once.

    Args:
        path: the file: tensors ``refiner.*`` with the configuration ``refiner`` in its metadata;
            ``unboxed.*`` and ``unboxed`` likewise, if there is one.

    Returns:
        The refiner, and the one that objects without a box have to themselves, or None.

    Raises:
        ValueError: the file holds no refiner, or is damaged.
    """
    state, metadata = read_weights(path)
    if "refiner" not in metadata:
        raise ValueError(
            f"{path}: no refiner in it (metadata {sorted(metadata)}); accepted: a bundle with "
            "'refiner' in its metadata"
        )

    def build(part: str) -> Refiner:
        with torch.device("meta"):  # no memory, no random numbers: every tensor is replaced
            model = Refiner(RefinerConfig.from_json(metadata[part], str(path)))
        load_state(model, with_all_channels(split_prefix(state, f"{part}.")), str(path))
        return model.eval()

    return build("refiner"), build("unboxed") if "unboxed" in metadata else None
