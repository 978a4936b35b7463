"""SAM-Med3D (Wang et al. 2023): its configuration, construction, and use in two steps.

The dear step, ``encode_image``, runs once a window; the cheap one, ``decode``, once a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inference.model.image_encoder import ImageEncoder
from inference.model.mask_decoder import MaskDecoder
from inference.model.prompt_encoder import DenseGrid, Points, PromptEncoder
from inference.model.relative_position import Axes
from inference.model.weights import NetworkConfig, load_state, read_weights, split_prefix

Windows = Literal["1.5mm", "box"]


@dataclasses.dataclass(frozen=True)
class SamMed3DConfig(NetworkConfig):
    """What the tensors of a weights file do not say by themselves.

    The two ``"public"`` flags stand for the function that public checkpoints learnt: relative
    positions added along mixed axes (``relative_position.py``), and a dense grid of positions
    whose first two axes are swapped (``PromptEncoder.get_dense_pe``). ``"aligned"`` is the form
    without either, for networks trained anew.

    Attributes:
        image_size: edge of the cubic window in voxels.
        patch_size: edge of a patch in voxels.
        embed_dim: channels of the image encoder.
        depth: blocks of the image encoder.
        num_heads: attention heads of the image encoder.
        global_blocks: blocks that attend over the whole grid.
        window: edge of the attention window of the other blocks, in tokens.
        prompt_width: channels of the image embedding, the prompts and the mask decoder.
        mask_in_chans: channels of the previous mask's branch.
        relative_positions: ``"public"`` or ``"aligned"``.
        dense_grid: ``"public"`` or ``"aligned"``.
        boxes: whether there are embeddings of box corners. Upstream's code has come with and
            without them.
        windows: what the network was trained to see: ``"1.5mm"``, cubes of 1.5 mm a voxel about
            the object, as public checkpoints, or ``"box"``, the object's region of interest.

    Raises:
        ValueError: a value is out of range, or values do not go together.
    """

    image_size: int = 128
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    prompt_width: int = 384
    mask_in_chans: int = 16
    relative_positions: Axes = "public"
    dense_grid: DenseGrid = "public"
    boxes: bool = True
    windows: Windows = "1.5mm"

    def __post_init__(self) -> None:
        """Reject what no network can be built from."""
        multiples = {
            "image_size": self.patch_size,
            "embed_dim": self.num_heads,
            "prompt_width": 48,  # of 3 for the positions, of 16 for 8 heads of half the width
            "mask_in_chans": 4,
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}: it must be a positive integer")
        if type(self.boxes) is not bool:
            raise ValueError(f"boxes is {self.boxes!r}: it must be True or False")
        for name, factor in multiples.items():
            if getattr(self, name) % factor:
                raise ValueError(f"{name} is {getattr(self, name)}: not a multiple of {factor}")
        if not all(type(i) is int and 0 <= i < self.depth for i in self.global_blocks):
            raise ValueError(f"global_blocks {self.global_blocks}: blocks are 0..{self.depth - 1}")
        for name, kinds in (
            ("relative_positions", Axes),
            ("dense_grid", DenseGrid),
            ("windows", Windows),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}: one of {get_args(kinds)}")


#: The public checkpoints' network, and the narrow encoder of the Enhanced SAM-Med3D paper.
CONFIGS = {
    "vit_b_768": SamMed3DConfig(),
    "vit_b_384": SamMed3DConfig(embed_dim=384),
}


class SamMed3D(nn.Module):
    """SAM-Med3D: embed a window once, then decode any number of prompts on it.

    Args:
        config: the shape of the network.
    """

    def __init__(self, config: SamMed3DConfig) -> None:
        super().__init__()
        self.config = config
        grid = config.image_size // config.patch_size
        self.image_encoder = ImageEncoder(
            image_size=config.image_size,
            patch=config.patch_size,
            width=config.embed_dim,
            depth=config.depth,
            heads=config.num_heads,
            global_blocks=config.global_blocks,
            window=config.window,
            out_channels=config.prompt_width,
            axes=config.relative_positions,
        )
        self.prompt_encoder = PromptEncoder(
            width=config.prompt_width,
            image_size=config.image_size,
            grid=grid,
            mask_channels=config.mask_in_chans,
            dense_grid=config.dense_grid,
            boxes=config.boxes,
        )
        self.mask_decoder = MaskDecoder(config.prompt_width)

    def encode_image(self, image: Tensor) -> Tensor:
        """Embed windows of an image.

        Args:
            image: (B, 1, S, S, S) with S = ``config.image_size``, z-normalised over its voxels
                above 0, in the axis order of training. Upstream trained ``turbo`` and
                ``turbo_bbox_init`` on canonically oriented (x, y, z) arrays at 1.5 mm, the two
                ``cvpr`` checkpoints on (z, y, x) arrays of the challenge.

        Returns:
            The embedding (B, prompt_width, S/16, S/16, S/16).

        Raises:
            ValueError: the image has another shape.
        """
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def decode(
        self,
        embedding: Tensor,
        points: Points | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        multimask_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Predict the masks of B prompts on one image, or of B images with one prompt each.

        Coordinates are voxel indices in the window tensor given to ``encode_image``, one component
        an axis **in the tensor's own order**: for a (z, y, x) window pass (z, y, x). Never swap
        them by hand, whatever ``config.dense_grid`` is: the swap of public checkpoints lies
        between their point encoding and their dense grid, was there in training as well, and is
        made up for by what they learnt. Index i names the centre of voxel i (0.5 is added here),
        so a fractional window coordinate is passed as it is.

        Args:
            embedding: (B or 1, C, g, g, g) from ``encode_image``.
            points: coordinates (B, N, 3) and labels (B, N): 1 object, 0 background, -1 filler.
            boxes: (B, 6) first and last voxel inside, (z0, y0, x0, z1, y1, x1) for a (z, y, x)
                window; only where ``config.boxes``.
            masks: (B, 1, S/4, S/4, S/4) logits of the previous ``decode``.
            multimask_output: three masks for an ambiguous prompt instead of one.

        Returns:
            Logits (B, 1 or 3, S/4, S/4, S/4), positive inside the object, and the predicted
            intersection over union of each (B, 1 or 3). Memory is about 13 MB a prompt for the
            128^3 networks: split a large batch.

        Raises:
            ValueError: shapes, labels or batch sizes are not as said.
        """
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=masks)
        masks, iou = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
        return masks, iou


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves out random initialisation, of tensors that are replaced anyway.

    On the meta device it would compute nothing, but import SymPy, which takes a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def build_sam_med3d(
    config: str | SamMed3DConfig,
    state: Mapping[str, Tensor] | None = None,
    source: str = "the given state",
) -> SamMed3D:
    """Build a network, with random weights or with those of a state dict.

    Args:
        config: ``"vit_b_768"`` (public checkpoints), ``"vit_b_384"`` or a configuration.
        state: tensors by their names in the network. They take the place of initialisation and
            are not copied where they are float32 already.
        source: where the state comes from, for messages.

    Raises:
        ValueError: an unknown name, or a state that is not exactly this network's.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"no network named {config!r}: one of {', '.join(CONFIGS)}")
        config = CONFIGS[config]
    if state is None:
        return SamMed3D(config)
    with torch.device("meta"), _NoRandomNumbers():
        model = SamMed3D(config)
    load_state(model, state, source)
    return model


def load_sam_med3d(path: Path) -> SamMed3D:
    """Load a network, in evaluation mode, from a public checkpoint, our own file or a bundle.

    The configuration is the one in the file's metadata under ``"sam"``. A public checkpoint has
    none; it is recognised by its width, and by whether it has embeddings of box corners.

    Args:
        path: ``.safetensors``, ``.pth`` or ``.pt``; in a bundle, the tensors under ``sam.``.

    Raises:
        ValueError: not a SAM-Med3D weights file, or a damaged one.
    """
    state, metadata = read_weights(path)
    state = split_prefix(state, "sam.") or state
    config = None
    if "sam" in metadata:
        config = SamMed3DConfig.from_json(metadata["sam"], str(path))
    elif "image_encoder.pos_embed" in state:
        width = state["image_encoder.pos_embed"].shape[-1:]
        boxes = "prompt_encoder.point_embeddings.2.weight" in state
        for known in CONFIGS.values():
            if width == (known.embed_dim,):
                config = dataclasses.replace(known, boxes=boxes)
    if config is None:
        raise ValueError(
            f"{path}: not SAM-Med3D weights: neither a configuration 'sam' in its metadata nor an "
            f"image encoder of a known width ({', '.join(CONFIGS)})"
        )
    return build_sam_med3d(config, state, str(path)).eval()
