"""Weights files: find, verify, read and write them.

``python -m inference.model.weights list`` shows what there is, ``... fetch NAME`` downloads a
public checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from inference.whole_file import replacing

#: Where weights lie unless a path is given.
WEIGHTS_DIR = Path(__file__).resolve().parents[2] / "weights"

#: Public checkpoints of SAM-Med3D (Hugging Face, blueyo0/SAM-Med3D, about 402 MB each).
PUBLIC = {
    "sam_med3d_turbo": "the authors' large collection, 1.5 mm",
    "sam_med3d_turbo_bbox_init": "turbo, prepared for a first click out of a box",
    "sam_med3d_turbo_cvpr_coreset": "a tenth of the CVPR 2025 challenge's data",
    "sam_med3d_turbo_cvpr_alldata": "all of the CVPR 2025 challenge's data",
}

#: What ``torch.load`` raises of files that it did not write, or that are damaged.
NOT_PICKLED = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError)

_SUMS = "SHA256SUMS"
_SUFFIXES = (".safetensors", ".pth", ".pt")


def find_weights(name: str | Path = "default", folder: Path = WEIGHTS_DIR) -> Path:
    """Find a weights file by its path, or by its name in ``folder`` with or without a suffix.

    Raises:
        FileNotFoundError: there is none; the message says what there is and how to get more.
    """
    tried = [folder / f"{name}{suffix}" for suffix in ("", *_SUFFIXES)]
    given = Path(name)
    if given.suffix in _SUFFIXES or len(given.parts) > 1:  # a name is none of the caller's files
        tried.insert(0, given)
    for path in tried:
        if path.is_file():
            return path
    message = (
        f"no weights {str(name)!r}: neither a file nor one of {_shorten(local_weights(folder))}"
    )
    if Path(name).stem in PUBLIC:
        message += f"; python -m inference.model.weights fetch {Path(name).stem} downloads it"
    raise FileNotFoundError(message)


def local_weights(folder: Path = WEIGHTS_DIR) -> list[str]:
    """Names of the weights files in ``folder``, sorted."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed_sha256(path: Path) -> str | None:
    """The SHA-256 that the ``SHA256SUMS`` beside a file lists for it, or None.

    Raises:
        ValueError: a line of that file is not ``HASH  NAME`` (the format of ``sha256sum``).
    """
    sums = path.with_name(_SUMS)
    if not sums.is_file():
        return None
    found = None
    for line in sums.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not name:
            raise ValueError(f"{sums}: line {line[:100]!r}: accepted is 'SHA256  NAME'")
        if name[1:] == path.name:  # after the mode: a space or an asterisk
            found = digest.lower()
    return found


def record_sha256(path: Path, digest: str) -> None:
    """List a file in the ``SHA256SUMS`` beside it, in the place of what was listed for its name."""
    sums = path.with_name(_SUMS)
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    kept = [line for line in lines if line.startswith("#") or line[66:] != path.name]
    with replacing(sums) as file:
        file.write("\n".join([*kept, f"{digest}  {path.name}", ""]).encode())


def verify_weights(path: Path) -> bool:
    """Check a file against the ``SHA256SUMS`` beside it; False where it is not listed there.

    Raises:
        ValueError: its SHA-256 is another one.
    """
    listed = listed_sha256(path)
    if listed is None:
        return False
    actual = sha256_of(path)
    if actual != listed:
        raise ValueError(
            f"{path}: its SHA-256 is {actual}, {path.with_name(_SUMS)} lists {listed}: the file is "
            "damaged or not the one that was recorded"
        )
    return True


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a weights file; nothing in it is ever executed.

    The tensors are views of the file on disk, read when first used. A file that the
    ``SHA256SUMS`` beside it lists is verified first.

    Args:
        path: ``.safetensors`` (metadata from its header), or a PyTorch ``.pth`` or ``.pt`` with
            the state dict itself or one under ``model_state_dict``, beside which other objects
            may lie: its numbers and strings become metadata, anything else is left out.

    Returns:
        Tensors by name, in the stored dtype, and metadata.

    Raises:
        ValueError: the file is damaged, does not match its SHA-256 or holds no state dict.
    """
    verify_weights(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, dict(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {first_line(error)}") from error
    if path.suffix in (".pth", ".pt"):
        return _state_dict_of(_load_pickled(path), path)
    raise ValueError(f"{path}: accepted are files named *{', *'.join(_SUFFIXES)}")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file without its tensors; empty for another kind.

    Raises:
        ValueError: not a safetensors file.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {first_line(error)}") from error


class _LeftOut:
    """Stands for any object of a checkpoint that is neither a tensor nor a plain value."""

    def __new__(cls, *args: object) -> _LeftOut:
        """Take and drop whatever the object would have been made from."""
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        """Likewise."""

    def __setstate__(self, state: object) -> None:
        """Likewise."""


def _load_pickled(path: Path) -> Any:
    """Load a PyTorch file with the weights-only unpickler.

    Public checkpoints carry extras (an argparse.Namespace, NumPy scalars, a scheduler's state)
    that the unpickler rejects. Every class or function it does not know by itself is replaced by
    an inert stand-in, so that none is imported, much less called.
    """
    try:
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # written before PyTorch 1.6, not a zip file: no stand-ins, no mapping
            return torch.load(path, map_location="cpu", weights_only=True)
        with torch.serialization.safe_globals([(_LeftOut, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except NOT_PICKLED as error:
        raise ValueError(f"{path}: not a PyTorch weights file: {first_line(error)}") from error


def _state_dict_of(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take tensors and plain values out of what a PyTorch file holds."""
    state, extras = content, {}
    if isinstance(content, dict) and "model_state_dict" in content:
        state, extras = content["model_state_dict"], content
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: neither a state dict nor a dict with one under model_state_dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path}: entry {str(name)[:80]!r} of the state dict is a {type(tensor).__name__}, "
                "not a tensor"
            )
    plain = {k: str(v) for k, v in extras.items() if isinstance(v, (int, float, str))}
    return dict(state), plain


def split_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one network of a bundle: names that begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """A network's shape: fields of plain values and tuples, kept as JSON in a file's metadata."""

    @classmethod
    def from_json(cls, text: str, source: str) -> Self:
        """Read what ``to_json`` wrote; fields left out take their defaults.

        Args:
            text: a JSON object.
            source: where it comes from, for the message.

        Raises:
            ValueError: no JSON object, an unknown field, or a value that the network refuses.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or not set(values) <= set(names):
                raise ValueError(f"accepted: {', '.join(names)}")
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {cls.__name__} {text[:200]}: {error}") from None

    def to_json(self) -> str:
        """The configuration as a JSON object, for a weights file's metadata."""
        return json.dumps(dataclasses.asdict(self))


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give a network its weights, as float32, without copying those that are already.

    Args:
        module: may lie on the meta device: every tensor is replaced.
        state: exactly the network's state dict, of any floating dtype.
        source: where the state comes from, for the message.

    Raises:
        ValueError: names are missing or unexpected, or shapes differ; the message names them.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {kind} ({_shorten(names)})" for kind, names in found if names]
    if problems:
        raise ValueError(
            f"{source}: not the weights of {type(module).__name__}: of {len(expected)} tensors "
            + ", ".join(problems)
        )
    module.load_state_dict({name: state[name].float() for name in expected}, assign=True)


def save_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file; it appears under its name only when it is complete.

    Equal tensors and metadata make equal bytes.

    Args:
        path: ends in ``.safetensors``; its folder must exist.
        tensors: by name; networks of a bundle under a prefix each, such as ``sam.``.
        metadata: text by name; a network's configuration as JSON under its prefix.
        dtype: store floating tensors so, such as ``torch.float16``; as they are by default.

    Raises:
        ValueError: another suffix, or metadata that is not text.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written to a file named *.safetensors")
    for name, text in metadata.items():
        if not isinstance(text, str):
            raise ValueError(f"metadata {name!r} is a {type(text).__name__}: it must be a str")
    ready = {}
    for name, tensor in tensors.items():
        stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A copy: tensors that share memory cannot be written as they are.
        ready[name] = tensor.detach().to("cpu", stored, copy=True).contiguous()
    data = save(ready, dict(metadata))
    size = int.from_bytes(data[:8], "little")
    # The library writes metadata in random order; sorted, equal contents have equal SHA-256.
    entries = json.loads(data[8 : 8 + size])
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(memoryview(data)[8 + size :])


def _shorten(names: Sequence[str]) -> str:
    """List five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) + more) or "none"


def first_line(error: BaseException) -> str:
    """The first line of an error's message: torch adds its stack."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """List or fetch weights; 0 when all went well, 1 after an error (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.model.weights", description="List or fetch weights."
    )
    parser.add_argument("--folder", type=Path, default=WEIGHTS_DIR, help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show public checkpoints and the files that are here")
    fetching = commands.add_parser("fetch", help="download a public checkpoint (about 402 MB)")
    fetching.add_argument("name", choices=PUBLIC)
    fetching.add_argument("--mirror", help="base address instead of Hugging Face's")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            _print_list(options.folder)
        else:
            from inference.model import download  # it costs time that inference need not spend

            path = download.fetch(options.name, options.folder, options.mirror or download.MIRROR)
            print(path)
    except (OSError, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _print_list(folder: Path) -> None:
    """Print public checkpoints and local files, each with its size and state."""
    local = local_weights(folder)
    for name in [*local, *(f"{n}.pth" for n in PUBLIC if f"{n}.pth" not in local)]:
        path = folder / name
        state, size = "to be fetched", ""
        if name in local:
            size = f"{path.stat().st_size / 1e6:.1f} MB"
            listed = listed_sha256(path)
            state = "not listed in SHA256SUMS"
            if listed is not None:
                same = sha256_of(path) == listed
                state = "verified" if same else "DAMAGED: its SHA-256 is not the one listed"
        print(f"{name:38}{size:>10}  {state:28}{PUBLIC.get(path.stem, '')}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
