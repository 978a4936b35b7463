"""Networks out of weights files and checkpoints: what a new run starts from, what is exported.

Fine-tuning may start from any of them: our own files, the public SAM-Med3D checkpoints, or a
checkpoint of another run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.model.refiner import CHANNELS, Refiner, RefinerConfig, with_all_channels
from inference.model.sam_med3d import SamMed3D, SamMed3DConfig, load_sam_med3d
from inference.model.weights import find_weights, read_metadata, read_weights, split_prefix
from training.checkpoint import read_saved

_CONFIGS: dict[str, type[RefinerConfig] | type[SamMed3DConfig]] = {
    "refiner": RefinerConfig,
    "sam": SamMed3DConfig,
}
#: What the same tensors may mean: a network that differs here computes something else with them.
_MEANING = ("num_heads", "global_blocks", "window", "relative_positions", "dense_grid")


@dataclass(frozen=True)
class TrainedNetwork:
    """The averaged network of a checkpoint.

    Attributes:
        kind: ``"refiner"`` or ``"sam"``: its prefix in a weights file, and its key in the metadata.
        config: its configuration.
        state: its tensors by name, float32.
        training: the run's configuration and what it has done so far (steps, windows, minutes).
    """

    kind: str
    config: RefinerConfig | SamMed3DConfig
    state: dict[str, Tensor]
    training: dict[str, Any]


def read_checkpoint(path: Path) -> TrainedNetwork:
    """Read the exponential moving average that a training checkpoint keeps.

    A checkpoint is a dict of plain values and tensors, with the average under ``average``, the
    network's configuration under ``refiner`` or ``sam``, and the run's under ``config``. A
    refiner's window is the last one of the run.

    Raises:
        ValueError: the file is no checkpoint; nothing in it is executed.
        OSError: it cannot be opened.
    """
    state = read_saved(path, mmap=True)
    kinds = [k for k in _CONFIGS if isinstance(state, dict) and isinstance(state.get(k), Mapping)]
    if len(kinds) != 1 or not isinstance(state.get("average"), Mapping):
        keys = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path}: received {keys}; accepted: a checkpoint of training, with 'average' and the "
            "configuration of its network under 'refiner' or 'sam'"
        )
    config = _CONFIGS[kinds[0]].from_json(json.dumps(state[kinds[0]]), str(path))
    run = state.get("config")
    if isinstance(config, RefinerConfig) and isinstance(run, Mapping) and run.get("windows"):
        # Whatever the network was built for: inference shows what training showed last.
        config = dataclasses.replace(config, window=int(run["windows"][-1][1]))
    training: dict[str, Any] = {"config": run}
    counts = {"step": "steps", "windows": "windows", "minutes": "minutes"}
    training |= {name: state[key] for key, name in counts.items() if key in state}
    tensors = dict(state["average"])
    if kinds[0] == "refiner":
        tensors = with_all_channels(tensors)
    return TrainedNetwork(kinds[0], config, tensors, training)


def read_bundle(path: Path, unboxed: bool = False) -> TrainedNetwork:
    """Read a refiner of a weights file of ours, as it was exported.

    Args:
        path: a ``.safetensors`` file.
        unboxed: the one for objects without a box.

    Raises:
        ValueError: the file is none of ours, is damaged or holds no such refiner.
        OSError: it cannot be opened.
    """
    state, metadata = read_weights(path)
    part = "unboxed" if unboxed else "refiner"
    if part not in metadata:
        raise ValueError(
            f"{path}: no {part} in it (metadata {sorted(metadata)}); accepted: a bundle with "
            f"{part!r} in its metadata, or a training checkpoint"
        )
    tensors = with_all_channels(split_prefix(state, f"{part}."))
    history = metadata.get(f"{part}_training", metadata.get("training", "{}"))
    config = RefinerConfig.from_json(metadata[part], str(path))
    full = {name: tensor.float() for name, tensor in tensors.items()}
    return TrainedNetwork("refiner", config, full, json.loads(history))


def initialise(
    model: Refiner | SamMed3D, path: Path | str, new: Sequence[str] = (), unboxed: bool = False
) -> list[str]:
    """Give a network the weights of a file, in place.

    Args:
        model: the network to be trained, on any device.
        path: a weights file or its name in ``weights/``: a ``.safetensors`` of ours, a public
            SAM-Med3D checkpoint (``.pth`` or ``.safetensors``), or a training checkpoint.
        new: beginnings of the names of parameters that the file may lack, hold in another shape
            (those keep their initialisation) or hold in excess. Everything else must fit exactly.
        unboxed: where a bundle has a refiner of its own for objects without a box, take that one.

    Returns:
        The names that kept their initialisation, sorted.

    Raises:
        ValueError: the file holds no such network, other parameters are missing, left over or of
            another shape, or the file's tensors mean another function (see ``SamMed3DConfig`` and
            ``RefinerConfig.coarse``).
        FileNotFoundError: there is no such file.
    """
    path = find_weights(path)
    kind = "refiner" if isinstance(model, Refiner) else "sam"
    config, state = _read_network(path, kind, unboxed)
    if kind == "sam":
        for field in _MEANING:
            theirs, ours = getattr(config, field), getattr(model.config, field)
            if theirs != ours:
                raise ValueError(
                    f"{path}: its {field} is {theirs!r}, the network's {ours!r}: its tensors would "
                    f"compute something else; accepted: a network with {field} {theirs!r}"
                )
    if isinstance(model, Refiner) and isinstance(config, RefinerConfig):
        if config.coarse and not model.config.coarse:
            raise ValueError(
                f"{path}: its second pass is shown the first one's logits, the network's is not; "
                "accepted: a network with coarse true (--set refiner.coarse=true)"
            )
        state = deaf(state) if model.config.coarse and not config.coarse else state
    own = model.state_dict()
    allowed = [name for name in {*own, *state} if name.startswith(tuple(new))] if new else []
    fitting = [n for n in own if n in state and state[n].shape == own[n].shape]
    fresh = sorted(set(own) - set(fitting))
    problems = {
        "missing": [n for n in fresh if n not in state and n not in allowed],
        "of another shape": [
            f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
            for n in fresh
            if n in state and n not in allowed
        ],
        "left over": sorted(n for n in state if n not in own and n not in allowed),
    }
    if any(problems.values()):
        said = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:4])}{', ...' * (len(names) > 4)})"
            for what, names in problems.items()
            if names
        )
        raise ValueError(
            f"{path}: does not fit {type(model).__name__}: {said}; accepted: all "
            f"{len(own)} parameters, less those named as new ({', '.join(new) or 'none are'})"
        )
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(state[name])  # a state dict's tensors are the network's own
    return fresh


def deaf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a refiner that never saw a first pass's logits, without what chance left there."""
    stem = state["stem.weight"].clone()
    stem[:, CHANNELS.index("coarse_logits")] = 0
    return {**state, "stem.weight": stem}


def _read_network(
    path: Path, kind: str, unboxed: bool
) -> tuple[RefinerConfig | SamMed3DConfig, Mapping[str, Tensor]]:
    """Configuration and tensors of the network of a kind, from any file that may hold it."""
    if path.suffix == ".pt":
        try:
            network = read_checkpoint(path)
        except ValueError:
            pass  # a plain state dict, as upstream's files
        else:
            if network.kind != kind:
                raise ValueError(f"{path}: a checkpoint of {network.kind!r}; accepted: {kind!r}")
            return network.config, network.state
    if kind == "sam":
        network_of_file: nn.Module = load_sam_med3d(path)
        return network_of_file.config, network_of_file.state_dict()  # type: ignore[return-value]
    held = read_bundle(path, unboxed and "unboxed" in read_metadata(path))
    return held.config, held.state
