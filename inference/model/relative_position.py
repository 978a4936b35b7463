"""Decomposed relative positions, over the real tokens of a padded attention window.

A window of S^3 tokens holds D x H x W real ones; the rest is padding, whose keys are all alike
(the key bias) and whose values are too. So the padding acts as ONE more key whose additive bias is
the log of the summed exponentials of the relative positions of all padded keys, its log mass. It
is computed here in closed form, without the padded tokens, and exactly. The relative positions
themselves are those of MViTv2 (Li et al. 2022, section 4.1), as in Segment Anything.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: Along which axes relative positions are added: as public checkpoints were trained, or rightly.
Axes = Literal["public", "aligned"]


def gather_offsets(table: Tensor) -> Tensor:
    """Lay out a table of offsets for every query and key: (2 S - 1, C) -> (S, S, C).

    Entry ``[i, j]`` of the result is row ``i - j + S - 1`` of the table: offset ``i - j``.
    """
    size = (table.shape[0] + 1) // 2
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place[None, :] + size - 1]


def relative_bias(
    query: Tensor, padded_query: Tensor, tables: tuple[Tensor, Tensor, Tensor], axes: Axes
) -> tuple[Tensor, Tensor | None]:
    """Compute the additive attention bias of one kind of window.

    With ``"aligned"`` axes, query (d, h, w) sees key (kd, kh, kw) with the bias
    ``q . (R_d[d-kd] + R_h[h-kh] + R_w[w-kw])``. Public checkpoints were trained with another sum,
    ``q(d,h,w) . R_d[d-kw] + q(d,h,kd) . R_h[h-kw] + q(d,h,kh) . R_w[kh-kw]``, which is what
    ``"public"`` computes: it is part of the function they learnt. Its second and third term read
    the queries at width kd and kh, padded ones too.

    Args:
        query: (N, heads, D, H, W, C) queries of the real tokens, unscaled, float32: the log mass
            sums over thousands of keys.
        padded_query: (heads, C) the query of a padded token (the query bias).
        tables: ``gather_offsets`` of the three axes, (S, S, C) each; D, H, W <= S.
        axes: which of the two sums.

    Returns:
        The bias (N, heads, L, L) for the L = D * H * W real tokens, and the log mass
        (N, heads, L, 1) of the padded keys; None where nothing is padded.
    """
    D, H, W = query.shape[2:5]
    along_d, along_h, along_w = tables
    if axes == "aligned":
        rel_d = torch.einsum("nmdhwc,dkc->nmdhwk", query, along_d[:D])
        rel_h = torch.einsum("nmdhwc,hkc->nmdhwk", query, along_h[:H])
        rel_w = torch.einsum("nmdhwc,wkc->nmdhwk", query, along_w[:W])
        keys = rel_h[..., None, :H, None] + rel_w[..., None, None, :W]
        bias = rel_d[..., :D, None, None] + keys  # (N, heads, D, H, W, kd, kh, kw)
        mass = _aligned_log_mass(rel_d, rel_h, rel_w, (D, H, W))
    else:
        size = along_w.shape[0]
        row = query  # queries along the padded width
        if size > W:
            padding = padded_query[:, None, None, None, :].expand(*query.shape[:4], size - W, -1)
            row = torch.cat([query, padding], dim=4)
        rel_d = torch.einsum("nmdhwc,dkc->nmdhwk", query, along_d[:D])
        rel_h = torch.einsum("nmdhwc,hkc->nmdhwk", row, along_h[:H])  # w is kd, k is kw
        rel_w = torch.einsum("nmdhwc,wkc->nmdhwk", row, along_w)  # w is kh, k is kw
        keys = rel_h[..., :D, None, :W] + rel_w[..., None, :H, :W]  # (N, heads, D, H, kd, kh, kw)
        bias = keys[:, :, :, :, None] + rel_d[..., None, None, :W]
        mass = _public_log_mass(rel_d, rel_h, rel_w, (D, H, W))
    if mass is not None:
        mass = mass.flatten(2)[..., None]
    return bias.flatten(5).flatten(2, 4), mass


def _aligned_log_mass(
    rel_d: Tensor, rel_h: Tensor, rel_w: Tensor, real: tuple[int, int, int]
) -> Tensor | None:
    """Log mass of the padded keys where each axis has its own term: (N, heads, D, H, W) or None.

    The padded keys are those padded in depth, those real in depth and padded in height, and those
    real in both and padded in width: three products of sums, all positive.
    """
    D, H, W = real
    size = rel_d.shape[-1]
    terms = []
    if size > D:
        terms.append(rel_d[..., D:].logsumexp(-1) + rel_h.logsumexp(-1) + rel_w.logsumexp(-1))
    real_d = rel_d[..., :D].logsumexp(-1)
    if size > H:
        terms.append(real_d + rel_h[..., H:].logsumexp(-1) + rel_w.logsumexp(-1))
    if size > W:
        terms.append(real_d + rel_h[..., :H].logsumexp(-1) + rel_w[..., W:].logsumexp(-1))
    return torch.stack(terms).logsumexp(0) if terms else None


def _public_log_mass(
    rel_d: Tensor, rel_h: Tensor, rel_w: Tensor, real: tuple[int, int, int]
) -> Tensor | None:
    """Log mass of the padded keys where every term depends on kw: (N, heads, D, H, W) or None.

    For one kw, the sum over (kd, kh) is a product of a sum over kd and one over kh, each split
    into real and padded; for a real kw the product of the two real sums is left out.
    """
    D, H, W = real
    size = rel_d.shape[-1]
    every_kd, every_kh = rel_h.logsumexp(-2), rel_w.logsumexp(-2)  # (N, heads, D, H, kw)
    terms = []  # log sums over (kd, kh), (N, heads, D, H, some kw), with those kw
    if size > H:
        padded_kh = rel_w[..., H:, :W].logsumexp(-2)
        terms.append((rel_h[..., :D, :W].logsumexp(-2) + padded_kh, slice(W)))
    if size > D:
        padded_kd = rel_h[..., D:, :W].logsumexp(-2)
        terms.append((padded_kd + every_kh[..., :W], slice(W)))
    if size > W:
        terms.append((every_kd[..., W:] + every_kh[..., W:], slice(W, None)))
    if not terms:
        return None
    masses = [rel_d[..., kw] + over_kd_kh[..., None, :] for over_kd_kh, kw in terms]
    return torch.cat(masses, dim=-1).logsumexp(-1)
