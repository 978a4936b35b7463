"""Which number format networks run in on a device.

cuDNN chooses its kernels by rule, which is torch's default and is left so: trying them out for each
number of windows would be paid for at every start, and one case could differ from run to run.
"""

from __future__ import annotations

import torch


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
