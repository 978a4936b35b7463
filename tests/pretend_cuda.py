"""A CUDA device for machines that have none: it says ``cuda`` and computes on the CPU.

What goes wrong only on a GPU goes wrong here, too: operands on two devices, NumPy on a tensor that
was never fetched, number formats that autocast leaves apart (CUDA's own rules apply, since the
tensors say ``cuda``), memory that runs out. What it cannot show: CUDA's own kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_CUDA = torch.device("cuda", 0)


class _OnCuda(Tensor):
    """A tensor that says it lies on CUDA; its values are in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnCuda:
        with torch.inference_mode(False):  # what is seen of a parameter must have its version
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=_CUDA,
            )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError(f"{func} on a tensor that outlived the device it was on")


class PretendCuda(TorchDispatchMode):
    """Computes what lies on its device, where it lies; counts the device's operations.

    Attributes:
        room: windows that a convolution may take at once; more raise what torch raises.
        fault: what each convolution raises, if anything.
        operations: on the device so far.
        largest: most windows that a convolution took at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.room = 1 << 30
        self.fault: RuntimeError | None = None
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [t for t in tensors if isinstance(t, _OnCuda)]
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        name = func.name().removeprefix("aten::").partition(".")[0]
        if not here and not to_cuda:
            return func(*args, **kwargs)
        self.operations += 1
        if name not in ("_to_copy", "copy_"):  # that is what those are for
            strangers = [t for t in tensors if t.dim() and not isinstance(t, _OnCuda)]
            if name.startswith("index"):  # places may be named by the CPU
                strangers = [t for t in strangers if t is args[0]]
            if here and strangers:
                raise RuntimeError(f"{func}: expected all tensors on the same device, found two")
        if "conv" in name:
            if self.fault is not None:
                raise self.fault
            if args[0].shape[0] > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self.largest = max(self.largest, args[0].shape[0])
        if to_cuda:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        args_here, kwargs_here = tree_map(_held, (args, kwargs))
        if "conv" in name and args_here[0].dtype in (torch.bfloat16, torch.float16):
            # CUDA adds up in float32; so do these, and CPUs take minutes for theirs in float16.
            dtype = args_here[0].dtype
            args_here = tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, args_here)
            result = func(*args_here, **kwargs_here).to(dtype)
        else:
            result = func(*args_here, **kwargs_here)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        if device is not None and not to_cuda:
            return result
        return tree_map(lambda x: _OnCuda(x) if isinstance(x, Tensor) else x, result)


class _WithoutGuards(TorchFunctionMode):
    """Sees to the few functions that ask the driver before they dispatch.

    They are indexing and fetching of single values; and ``cuda`` without a number, which only the
    driver can resolve.
    """

    FETCH = (Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.item, Tensor.tolist)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = tree_map(_numbered, (args, kwargs or {}))
        if args and isinstance(args[0], _OnCuda):
            if func in self.FETCH:
                return func(args[0].held)
            if func is Tensor.__setitem__:
                value = args[2]
                if isinstance(value, Tensor) and value.dim() and not isinstance(value, _OnCuda):
                    raise RuntimeError("a CPU tensor assigned to a part of a CUDA tensor")
                return func(*tree_map(_held, args))
            if func is Tensor.contiguous:
                return args[0] if args[0].held.is_contiguous() else _OnCuda(func(args[0].held))
            if func is Tensor.new_tensor:
                return _OnCuda(func(args[0].held, *args[1:], **kwargs))
            if func is Tensor.__getitem__:
                return _OnCuda(func(*tree_map(_held, args)))
        return func(*args, **kwargs)


def _numbered(x: Any) -> Any:
    unnumbered = isinstance(x, str | torch.device) and str(x) == "cuda"
    return _CUDA if unnumbered else x


def _held(x: Any) -> Any:
    return x.held if isinstance(x, _OnCuda) else x


@contextlib.contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch, half: bool = False) -> Iterator[PretendCuda]:
    """While it lasts there is a CUDA device; ``half``: a card without bfloat16."""
    gib = 2**30
    monkeypatch.setattr("torch.cuda._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: not half)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (8 * gib, 16 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 0)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    # As FakeTensorMode does: torch.tensor makes its values on the CPU and dispatches the copy.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    # A module moves by new parameters; old ones are plain tensors that can hold nothing.
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _WithoutGuards(), PretendCuda() as device:
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        torch._C._set_only_lift_cpu_tensors(before)
