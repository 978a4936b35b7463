"""The processes of a run: one by default, several under ``torchrun``."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: 0..size-1; rank 0 logs and saves.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def wrap(self, network: nn.Module, unused: bool = False) -> nn.Module:
        """The network, averaging its gradients over all processes.

        Args:
            network: on this process's device.
            unused: whether some parameters are without gradient in some steps.
        """
        if self.size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, find_unused_parameters=unused)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the host."""
        if self.size == 1:
            return values
        total = values.to(self.device)
        distributed.all_reduce(total)
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """A value of every process at rank 0, in order; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size if self.first else []
        distributed.gather_object(value, found if self.first else None)
        return found

    def from_first(self, value: float) -> float:
        """The first process's number, in every process: clocks differ."""
        if self.size == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(said, 0)
        return float(said.item())

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            distributed.barrier()


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, if it did, and leave them at the end.

    Args:
        device: ``cpu`` or ``cuda``; each process takes the GPU of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, torch.device(device))
        return
    # Optimisers import this sooner or later. A group that exists by then outlives its destruction:
    # its threads are left when the interpreter ends, and now and then the process aborts there.
    importlib.import_module("torch._dynamo")
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), size, own)
    finally:
        distributed.destroy_process_group()


def without_sync(network: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Where gradients are only accumulated: they need not cross the network."""
    if wanted and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()
