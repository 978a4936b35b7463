"""The mask decoder of SAM-Med3D: image and prompt embeddings become masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inference.model.layers import MLP, LayerNorm3d
from inference.model.transformer import TwoWayTransformer

#: Masks of one ambiguous prompt, beside the one of an unambiguous prompt.
MULTIMASK = 3


class MaskDecoder(nn.Module):
    """Predicts masks and their quality after Segment Anything (Kirillov et al. 2023, appendix A).

    Args:
        width: channels C of the embeddings, a multiple of 16.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(depth=2, width=width, heads=8, hidden=2048)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(1 + MULTIMASK, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(width, width // 4, kernel_size=2, stride=2),
            LayerNorm3d(width // 4),
            nn.GELU(),
            nn.ConvTranspose3d(width // 4, width // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(width, width, width, width // 8) for _ in range(1 + MULTIMASK)
        )
        self.iou_prediction_head = MLP(width, 256, 256, 1 + MULTIMASK)

    def forward(
        self,
        *,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Decode B prompts on one image, or B images with one prompt each.

        Args:
            image_embeddings: (B or 1, C, g, g, g).
            image_pe: (B or 1, C, g, g, g) positions of the image's tokens.
            sparse_prompt_embeddings: (B or 1, N, C).
            dense_prompt_embeddings: (B or 1, C, g, g, g).
            multimask_output: return the three masks of an ambiguous prompt instead of the one.

        Returns:
            Logits (B, 1 or 3, 4 g, 4 g, 4 g) and predicted intersection over union (B, 1 or 3).

        Raises:
            ValueError: the batch sizes do not go together.
        """
        batches = {
            "images": image_embeddings.shape[0],
            "image positions": image_pe.shape[0],
            "sparse prompts": sparse_prompt_embeddings.shape[0],
            "dense prompts": dense_prompt_embeddings.shape[0],
        }
        if len(set(batches.values()) - {1}) > 1:
            raise ValueError(f"batch sizes {batches}: each must be 1 or the same as the others")
        B = max(batches.values())
        image = image_embeddings + dense_prompt_embeddings
        grid = image.shape[2:]
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat(
            [tokens.expand(B, -1, -1), sparse_prompt_embeddings.expand(B, -1, -1)], dim=1
        )
        image = image.flatten(2).transpose(1, 2).expand(B, -1, -1)
        tokens, image = self.transformer(image, image_pe.flatten(2).transpose(1, 2), tokens)

        chosen = range(1, 1 + MULTIMASK) if multimask_output else range(1)
        weights = [self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen]
        upscaled = self.output_upscaling(image.transpose(1, 2).unflatten(2, grid))
        masks = torch.einsum("btc,bcdhw->btdhw", torch.stack(weights, dim=1), upscaled)
        iou = self.iou_prediction_head(tokens[:, 0])
        return masks, iou[:, chosen.start : chosen.stop]
