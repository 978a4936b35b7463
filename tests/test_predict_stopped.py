"""A command line that is stopped or killed: outputs of before stay, nothing is half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.test_predict import CHECKOUT, SHAPE, names, write_case

# A process of its own with the stand-in below: what a kill leaves behind.
PROCESS = """
    import signal, sys, time, types
    import numpy as np
    # Who starts the tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Segmenter:
        used_device = types.SimpleNamespace(type="cpu")
        @classmethod
        def from_files(cls, *_, **__):
            return cls()
        def segment_case(self, case, finish=None):
            if {hang}:
                print("segmenting", flush=True)
                time.sleep(60)
            return np.random.default_rng(0).integers(0, 256, case.image.shape, dtype=np.uint8)

    torch = types.ModuleType("torch")
    segmenter = types.ModuleType("inference.segmenter")
    segmenter.Segmenter = Segmenter
    finishing = types.ModuleType("inference.finishing")
    finishing.Finisher = lambda *_: types.SimpleNamespace(probabilities=None)
    sys.modules |= {{
        "torch": torch,
        "inference.segmenter": segmenter,
        "inference.finishing": finishing,
    }}
    sys.argv = ["predict", *sys.argv[1:]]
    import runpy
    runpy.run_module("inference.predict", run_name="__main__")
"""


@contextmanager
def process(tmp_path: Path, hang: bool) -> Iterator[subprocess.Popen[str]]:
    folders = ["--inputs", tmp_path / "in", "--outputs", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROCESS).format(hang=hang), *folders],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def earlier_output(tmp_path: Path) -> bytes:
    (tmp_path / "out").mkdir()
    np.savez(tmp_path / "out" / "CT_a.npz", segs=np.ones(SHAPE, np.uint8))
    return (tmp_path / "out" / "CT_a.npz").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_leaves_nothing_half_written(tmp_path, number):
    write_case(tmp_path / "in", "CT_a.npz")
    before = earlier_output(tmp_path)
    with process(tmp_path, hang=True) as running:
        assert running.stdout.readline() == "segmenting\n"
        running.send_signal(number)
        assert running.communicate(timeout=30) == ("", "")
    assert running.returncode == 128 + number
    assert names(tmp_path / "out") == ["CT_a.npz"]
    assert (tmp_path / "out" / "CT_a.npz").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_writing(tmp_path, number):
    # Noise of 24 million voxels takes about a second to compress and write.
    write_case(tmp_path / "in", "CT_a.npz", imgs=np.zeros((96, 500, 500), np.uint8))
    before = earlier_output(tmp_path)
    with process(tmp_path, hang=False) as running:
        deadline = time.monotonic() + 30
        while len(names(tmp_path / "out")) == 1 and time.monotonic() < deadline:
            time.sleep(0.002)
        running.send_signal(number)
        running.communicate(timeout=30)
    assert running.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 143)
    assert (tmp_path / "out" / "CT_a.npz").read_bytes() == before
    left = names(tmp_path / "out")
    if number == signal.SIGKILL:
        assert len(left) == 2, "killed while the new file was being written"
        left = [name for name in left if name.endswith(".npz")]
    assert left == ["CT_a.npz"], "what a kill leaves is never taken for a result"
