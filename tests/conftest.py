"""Fixtures every test may use: fixed seeds, two threads, and the real data where it is."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

CHECKOUT = Path(__file__).resolve().parents[1]

torch.set_num_threads(2)
# Machines are shared: how long an example takes says nothing about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every run and in every order of the tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real labelled volumes (train/, val/, label_maps/, labels_only/)."""
    folder = Path(os.environ.get("SHARED_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set SHARED_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def shared_golden(shared_data: Path) -> Path:
    """The folder of golden tensors, beside the data."""
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden tensors at {folder}")
    return folder
