"""Weights files: what is read, what is refused, and that nothing in them runs."""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import pathlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from inference.model import weights
from inference.model.weights import (
    find_weights,
    load_state,
    read_weights,
    record_sha256,
    save_weights,
    split_prefix,
    verify_weights,
)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return nn.Linear(3, 2).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    metadata = {"sam": '{"depth": 2}', "trained on": "Ωne volume"}
    save_weights(path, state, metadata)
    tensors, read = read_weights(path)
    assert same(dict(sorted(tensors.items())), dict(sorted(state.items())))
    assert read == metadata
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_same_tensors_make_the_same_bytes(state: dict[str, Tensor], tmp_path: Path) -> None:
    metadata = {f"key {i}": str(i) for i in range(20)}
    for name in ("a.safetensors", "b.safetensors"):
        save_weights(tmp_path / name, state, metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_half_precision_on_disk_is_float32_in_the_network(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    path = tmp_path / "half.safetensors"
    save_weights(path, {**module.state_dict(), "n": torch.arange(2)}, {}, dtype=torch.float16)
    tensors, _ = read_weights(path)
    assert tensors["weight"].dtype == torch.float16
    assert tensors.pop("n").dtype == torch.int64
    other = nn.Linear(3, 2)
    load_state(other, tensors, "half")
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.weight, module.weight.half().float())


def test_shared_and_strided_tensors_are_written(tmp_path: Path) -> None:
    one = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": one, "b": one, "t": one.T}, {})
    tensors, _ = read_weights(path)
    assert same(tensors, {"a": one, "b": one, "t": one.T})


def test_a_failed_write_leaves_the_old_file(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, state, {"version": "1"})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_weights(path, state, {"version": "2"})
    assert read_weights(path)[1] == {"version": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_what_cannot_be_written(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\*\.safetensors"):
        save_weights(tmp_path / "w.pth", state, {})
    with pytest.raises(ValueError, match="'epoch' is a int"):
        save_weights(tmp_path / "w.safetensors", state, {"epoch": 3})  # type: ignore[dict-item]


def extras() -> dict[str, Any]:
    """What a training script puts beside its weights."""
    return {
        "epoch": 7,
        "best_dice": np.float64(0.5),
        "losses": [np.float32(1.5), 2.0],
        "array": np.arange(3),
        "args": argparse.Namespace(task="x", work_dir=pathlib.PurePosixPath("/data")),
        "lr_scheduler_state_dict": {"milestones": collections.Counter({120: 1, 180: 1})},
        "defaults": collections.defaultdict(list),
        "used_datas": ["a", "b"],
        "note": "turbo",
        "device": torch.device("cpu"),
    }


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_plain_checkpoints(
    state: dict[str, Tensor], tmp_path: Path, nested: bool, zip_file: bool
) -> None:
    content = {"model_state_dict": state, "epoch": 7} if nested else state
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zip_file)
    tensors, metadata = read_weights(path)
    assert same(tensors, state)
    assert metadata == ({"epoch": "7"} if nested else {})


def test_checkpoint_with_pickled_extras(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "public.pth"
    allowed = set(torch.serialization.get_safe_globals())
    torch.save({"model_state_dict": state, **extras()}, path)
    tensors, metadata = read_weights(path)
    assert same(tensors, state)
    assert metadata == {"epoch": "7", "note": "turbo"}
    assert set(torch.serialization.get_safe_globals()) == allowed  # the stand-ins are gone


class Malicious:
    """Calls ``function(*arguments)`` when it is unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, subprocess.getoutput, eval, exec, Path.touch, __import__]
)
def test_a_malicious_checkpoint_runs_nothing(
    state: dict[str, Tensor], tmp_path: Path, function: Any
) -> None:
    victim = tmp_path / "victim"
    argument: object = {
        os.system: f"touch {victim}",
        subprocess.getoutput: f"touch {victim}",
        eval: f"open({str(victim)!r}, 'w').close()",
        exec: f"open({str(victim)!r}, 'w').close()",
        Path.touch: victim,
        __import__: "antigravity",
    }[function]
    path = tmp_path / "w.pth"
    torch.save({"model_state_dict": state, "evil": Malicious(function, argument)}, path)
    try:
        tensors, metadata = read_weights(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert same(tensors, state)
        assert metadata == {}
    assert not victim.exists()
    assert "antigravity" not in sys.modules


def test_a_malicious_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model_state_dict": {"weight": Malicious(print, "called")}}, path)
    with pytest.raises(ValueError, match="'weight' of the state dict is a _LeftOut, not a tensor"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"<!doctype html>", b"PK\x03\x04junk", b"\x00" * 100, b"version https://git-lfs"],
)
def test_damaged_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*not a (PyTorch weights|safetensors) file[^\n]*$"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_truncated_files(
    state: dict[str, Tensor], tmp_path: Path, suffix: str, kept: float
) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_weights(path, state, {})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"not a (PyTorch weights|safetensors) file"):
        read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model_state_dict": 3}, {"weight": 3}])
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="state dict"):
        read_weights(path)
    with pytest.raises(ValueError, match=r"\*\.safetensors, \*\.pth, \*\.pt"):
        read_weights(tmp_path / "w.bin")


def test_sha256_is_checked_where_it_is_listed(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, state, {})
    assert not verify_weights(path)
    record_sha256(tmp_path / "other", "0" * 64)
    assert not verify_weights(path)
    record_sha256(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert verify_weights(path)
    done = subprocess.run(["sha256sum", "--check", "--ignore-missing", "SHA256SUMS"], cwd=tmp_path)
    assert done.returncode == 0
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"its SHA-256 is .* lists .* damaged"):
        read_weights(path)
    (tmp_path / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(ValueError, match="accepted is 'SHA256  NAME'"):
        read_weights(path)


def test_strict_keys_and_shapes() -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    state = module.state_dict()
    del state["1.bias"]
    state["0.weight"] = torch.zeros(3, 2)
    state.update({f"extra.{i}": torch.zeros(1) for i in range(8)})
    with pytest.raises(ValueError) as caught:
        load_state(module, state, "some file")
    assert str(caught.value) == (
        "some file: not the weights of Sequential: of 8 tensors 1 missing (1.bias), 8 unexpected "
        "(extra.0, extra.1, extra.2, extra.3, extra.4 and 3 more), 1 of another shape (0.weight "
        "(3, 2) for (2, 2))"
    )


def test_split_prefix() -> None:
    bundle = {"sam.a": torch.zeros(1), "sam.sam.b": torch.ones(1), "refiner.a": torch.ones(2)}
    assert list(split_prefix(bundle, "sam.")) == ["a", "sam.b"]
    assert same(split_prefix(bundle, "refiner."), {"a": torch.ones(2)})
    assert split_prefix(bundle, "other.") == {}


def test_find_weights(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_weights(path, state, {})
    for name in ("mine", "mine.safetensors", path, str(path)):
        assert find_weights(name, tmp_path) == path
    with pytest.raises(FileNotFoundError, match=r"no weights 'yours': .* mine\.safetensors$"):
        find_weights("yours", tmp_path)
    with pytest.raises(FileNotFoundError, match="fetch sam_med3d_turbo downloads it"):
        find_weights("sam_med3d_turbo.pth", tmp_path)
    with pytest.raises(FileNotFoundError, match="one of none"):
        find_weights("mine", tmp_path / "absent")


def test_a_name_is_none_of_the_callers_files(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("hello", encoding="utf-8")
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / "mine.safetensors"
    save_weights(path, state, {})
    assert find_weights("mine", tmp_path / "weights") == path
    assert find_weights(tmp_path / "mine", tmp_path / "weights") == tmp_path / "mine"


def test_list(state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        save_weights(tmp_path / f"{name}.safetensors", state, {})
    record_sha256(tmp_path / "a.safetensors", weights.sha256_of(tmp_path / "a.safetensors"))
    record_sha256(tmp_path / "b.safetensors", "0" * 64)
    assert weights.main(["--folder", str(tmp_path), "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "verified" in lines["a.safetensors"]
    assert "DAMAGED" in lines["b.safetensors"]
    assert "not listed" in lines["c.safetensors"]
    assert all("to be fetched" in lines[f"{name}.pth"] for name in weights.PUBLIC)
    (tmp_path / "SHA256SUMS").write_text("no hash", encoding="utf-8")
    assert weights.main(["--folder", str(tmp_path), "list"]) == 1
    assert "line 'no hash': accepted is 'SHA256  NAME'" in capsys.readouterr().err


def test_reading_maps_the_file(tmp_path: Path) -> None:
    """A safetensors file is not copied: what the header says is where the tensor lies."""
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.arange(1000.0)}, {})
    tensor = read_weights(path)[0]["a"]
    tensor += 1  # private to this process: the file keeps what it has
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.arange(1000.0))
