"""Muon in float32, for processors that only emulate the library's bfloat16."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` (Jordan et al. 2024), matrices of one shape together and in float32.

    A change of a weight is .2 of the rate in the mean, as AdamW's (Liu et al. 2025). States are
    the library's, so that either goes on from the other's checkpoint. With AVX2 alone the
    library's iteration took 6.9 of a training step's 12 seconds; this one takes .15.

    Args:
        matrices: what is trained, each (rows, columns).
        lr: rate; as ``weight_decay``, the groups' own values count in a step.
    """

    def __init__(self, matrices: list[Tensor], lr: float) -> None:
        """One group of matrices."""
        super().__init__(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every matrix that has a gradient.

        Args:
            closure: what computes the loss anew, if anything.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                self._step(matrices, group)
        return loss

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Change matrices of one shape."""
        momentum, rate = group["momentum"], group["lr"]
        ahead = []  # Nesterov's momentum
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            gradient, buffer = matrix.grad, state["momentum_buffer"]
            assert gradient is not None
            buffer.lerp_(gradient, 1 - momentum)
            ahead.append(gradient.lerp(buffer, momentum))
        changes = orthogonalised(
            torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        size = 0.2 * math.sqrt(max(matrices[0].shape))
        for matrix, change in zip(matrices, changes, strict=True):
            matrix.mul_(1 - rate * group["weight_decay"]).sub_(change, alpha=rate * size)


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Singular values brought near 1 by Newton-Schulz iteration (Jordan et al. 2024).

    A step turns X into q(XX^T) X with q(s) = a + bs + cs^2. All that changes is a factor on the
    short side, a polynomial in XX^T; that alone is iterated, and multiplied with X once. For
    128 x 3456 it takes a third of the time.

    Args:
        matrices: (B, rows, columns) float32.
        coefficients: a, b, c.
        steps: of the iteration.
        eps: the least norm a matrix is divided by.

    Returns:
        (B, rows, columns); the library's coefficients and five steps leave singular values of
        .7 to 1.2 where they were a thousandth of the matrix's norm or more.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=eps)
    square = wide @ wide.mT
    factor = torch.eye(square.shape[-1], device=square.device).expand_as(square)
    for _ in range(steps):
        q = torch.baddbmm(square, square, square, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        factor, square = q @ factor, q @ square @ q
    return (factor @ wide).mT if tall else factor @ wide
