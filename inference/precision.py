"""Which device to compute on, and in which number format and order networks run there.

cuDNN chooses its kernels by rule, which is torch's default and is left so: trying them out for each
number of windows would be paid for at every start, and one case could differ from run to run.
"""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)

_ROOM = 1 << 29  # bytes that must be free on a GPU to begin there: the networks, a few windows


def choose_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` stands for.

    ``auto`` is CUDA where a GPU does compute: one that is busy, full, or of a kind that this build
    of torch knows no longer is left alone, and a line of the log says so.

    Raises:
        ValueError: CUDA is asked for, and there is none.
    """
    if name != "auto":
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{name}: torch finds no CUDA device here; accepted: auto or cpu")
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        torch.empty(_ROOM, dtype=torch.uint8, device=device)
        with autocast(device):
            volume = torch.ones((1, 8, 4, 4, 4), device=device)
            float(F.conv3d(volume, volume).sum())  # waits until it is done
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        logging.getLogger(__name__).warning("the GPU is left alone, the CPU computes: %s", reason)
        return torch.device("cpu")
    return device


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision where the device has it in hardware.

    bfloat16 on CUDA (float16 on cards before Ampere) and on CPUs with AVX-512 or better; float32
    elsewhere, where bfloat16 would be emulated.
    """
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        return torch.autocast("cuda", dtype)
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.autocast("cpu", torch.bfloat16, enabled=supported)


def placed(network: Network, device: torch.device) -> Network:
    """A network of 3D convolutions on a device, its weights in the order in which that computes."""
    if device.type == "cpu":
        # With channels first oneDNN reorders what goes in and out of every convolution. CUDA's
        # group normalisation would reorder the other way round.
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network.to(device).eval()
