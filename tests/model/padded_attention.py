"""The image encoder written out literally: windows padded with zero tokens, attended to in full.

Shares the parameters of an ``ImageEncoder`` but none of its code. Slow; it is the oracle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inference.model.image_encoder import Attention, ImageEncoder


def padded_attention(attention: Attention, x: Tensor) -> Tensor:
    """Windowed attention with every padded token in place: (B, D, H, W, C) -> the same shape."""
    B, D, H, W, C = x.shape
    S = attention.size
    d, h, w = (math.ceil(length / S) for length in (D, H, W))
    padded = x.new_zeros(B, d * S, h * S, w * S, C)
    padded[:, :D, :H, :W] = x
    out = torch.empty_like(padded)
    for i in range(d):
        for j in range(h):
            for k in range(w):
                part = (
                    slice(None),
                    slice(i * S, (i + 1) * S),
                    slice(j * S, (j + 1) * S),
                    slice(k * S, (k + 1) * S),
                )
                out[part] = full_attention(attention, padded[part])
    return out[:, :D, :H, :W]


def full_attention(attention: Attention, x: Tensor) -> Tensor:
    """Softmax attention over all S^3 tokens of a window, term by term: (B, S, S, S, C)."""
    B, S, _, _, C = x.shape
    heads, width = attention.heads, C // attention.heads
    qkv = attention.qkv(x).reshape(B, S**3, 3, heads, width)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))  # (B, heads, S^3, width)
    scores = (q * width**-0.5) @ k.transpose(-2, -1)
    offset = torch.arange(S)[:, None] - torch.arange(S)[None, :] + S - 1
    grid = q.reshape(B, heads, S, S, S, width)
    rel_d = torch.einsum("bmdhwc,dkc->bmdhwk", grid, attention.rel_pos_d[offset])
    rel_h = torch.einsum("bmdhwc,hkc->bmdhwk", grid, attention.rel_pos_h[offset])
    rel_w = torch.einsum("bmdhwc,wkc->bmdhwk", grid, attention.rel_pos_w[offset])
    scores = scores.reshape(B, heads, S, S, S, S, S, S)
    if attention.axes == "aligned":
        scores = scores + rel_d[..., :, None, None]
        scores = scores + rel_h[..., None, :, None]
        scores = scores + rel_w[..., None, None, :]
    else:  # key (kd, kh, kw): rel_d[d,h,w; kw] + rel_h[d,h,kd; kw] + rel_w[d,h,kh; kw]
        scores = scores + rel_d[:, :, :, :, :, None, None, :]
        scores = scores + rel_h[:, :, :, :, None, :, None, :]
        scores = scores + rel_w[:, :, :, :, None, None, :, :]
    weights = scores.reshape(B, heads, S**3, S**3).softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(B, S, S, S, C)
    result: Tensor = attention.proj(out)
    return result


def padded_encoder(encoder: ImageEncoder, image: Tensor) -> Tensor:
    """The whole encoder on that attention: (B, 1, S, S, S) -> (B, C, g, g, g)."""
    x = encoder.patch_embed.proj(image).permute(0, 2, 3, 4, 1) + encoder.pos_embed
    for block in encoder.blocks:
        x = x + padded_attention(block.attn, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    result: Tensor = encoder.neck(x.permute(0, 4, 1, 2, 3))
    return result
