"""Write trained networks as the weights file that inference reads, and their figures beside it.

    python -m training.export --checkpoint RUN/checkpoint.pt --out weights/default.safetensors
    python -m training.export ... --figures box=EVALUATION/summary.csv --card weights/MODEL_CARD.md

The file holds the averaged network in half precision, with its configuration and that of the run
as metadata; equal checkpoints give equal bytes. Its SHA-256 is listed in the ``SHA256SUMS`` beside
it. Checkpoints of a refiner and of a SAM-Med3D make a bundle of both; several of one kind, runs
that went on from each other, make the mean of their weights (Wortsman et al. 2022, "Model soups").
``--unboxed`` adds a refiner that objects without a box have to themselves. Either takes a weights
file, too, for a network that stays as it is.
Figures are taken from the summaries of evaluations of exactly this file
(``training/model_card.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from inference.model.refiner import RefinerConfig, load_refiners
from inference.model.sam_med3d import SamMed3DConfig, load_sam_med3d
from inference.model.weights import record_sha256, save_weights, sha256_of
from training.initial_weights import TrainedNetwork, deaf, read_bundle, read_checkpoint
from training.model_card import Figures, read_figures, write_figures

_LARGEST_HALF = torch.finfo(torch.float16).max
_NETWORKS = ("refiner", "unboxed", "sam")  # whose configurations the metadata has


def export(
    checkpoints: Sequence[Path],
    out: Path,
    notes: Mapping[str, str],
    unboxed: Sequence[Path] = (),
) -> None:
    """Store exponential moving averages in half precision, with what they are and how they came.

    Args:
        checkpoints: written by training, or weights files for their refiner; those of a kind are
            averaged, and the last one's history is told with that of the others under
            ``mean_with``.
        out: ends in ``.safetensors``; its folder exists. Replaced only by a whole file.
        notes: further metadata, such as the data.
        unboxed: checkpoints of the refiner for objects without a box, or weights files for theirs,
            averaged likewise.

    Raises:
        ValueError: a file is no checkpoint, two of one kind are of different networks, one for
            objects without a box is no refiner, or weights are beyond what half precision holds.
    """
    networks: dict[str, list[TrainedNetwork]] = {}
    given = [*((path, False) for path in checkpoints), *((path, True) for path in unboxed)]
    for path, without_box in given:
        bundle = path.suffix == ".safetensors"
        network = read_bundle(path, without_box) if bundle else read_checkpoint(path)
        kind = network.kind
        if without_box:
            if kind != "refiner":
                raise ValueError(f"{path}: a {kind}; accepted for objects without a box: a refiner")
            kind = "unboxed"
        alike = networks.setdefault(kind, [])
        alike.append(network)
        if _shape(network) != _shape(alike[0]):
            raise ValueError(f"{path}: another {kind} than the first; accepted: one shape")
        for name, tensor in network.state.items():
            if not (tensor.abs() <= _LARGEST_HALF).all():  # NaN compares false, too
                raise ValueError(
                    f"{path}: {name} holds NaN, infinity or more than {_LARGEST_HALF:g}; accepted: "
                    "what half precision can store"
                )
    metadata = dict(notes)
    tensors: dict[str, Tensor] = {}
    for kind, alike in networks.items():
        # One that hears first passes knows what those that do not know, and goes for all.
        fullest = max(alike, key=_hears)
        metadata[kind] = fullest.config.to_json()
        states = [one.state if _hears(one) == _hears(fullest) else deaf(one.state) for one in alike]
        # A file with one network has its history under "training".
        key = "training" if len(networks) == 1 else f"{kind}_training"
        *others, training = [dict(network.training) for network in alike]
        if others and "mean_with" in training:
            others.append(dict(training))  # a mean itself: what of is not forgotten
        for run in (training, *others):
            if "minutes" in run:
                run["minutes"] = round(run["minutes"], 1)
        metadata[key] = json.dumps(training | ({"mean_with": others} if others else {}))
        for name in states[0]:
            tensors[f"{kind}.{name}"] = torch.stack([state[name] for state in states]).mean(0)
    trial = out.with_name(f".{os.getpid()}.{out.name}")  # unlisted, so that nothing is compared
    try:
        save_weights(trial, tensors, metadata, dtype=torch.float16)
        for kind in networks:  # what was written can be read
            _ = load_sam_med3d(trial) if kind == "sam" else load_refiners(trial)
        digest = sha256_of(trial)
        trial.replace(out)
    finally:
        trial.unlink(missing_ok=True)
    record_sha256(out, digest)


def _hears(network: TrainedNetwork) -> bool:
    """Whether a refiner is shown a first pass's logits."""
    return isinstance(network.config, RefinerConfig) and network.config.coarse


def _shape(network: TrainedNetwork) -> RefinerConfig | SamMed3DConfig:
    """What two networks must share to have a mean."""
    config = network.config
    return dataclasses.replace(config, coarse=False) if _hears(network) else config  # type: ignore[call-arg]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        action="append",
        help="again for a bundle or a mean",
    )
    parser.add_argument(
        "--unboxed", type=Path, default=[], action="append", help="again for a mean"
    )
    parser.add_argument("--out", type=Path, required=True, help="NAME.safetensors")
    parser.add_argument("--note", nargs="*", default=[], type=_note, metavar="KEY=TEXT")
    parser.add_argument(
        "--figures",
        action="append",
        default=[],
        type=Figures.parse,
        metavar="[NAME=]CSV",
        help="summary.csv of an evaluation of these weights, and a heading for it",
    )
    parser.add_argument("--card", type=Path, help="Markdown file the figures are written into")
    options = parser.parse_args(arguments)
    if bool(options.figures) != bool(options.card):
        parser.error("--figures and --card go together")
    try:
        export(options.checkpoint, options.out, dict(options.note), options.unboxed)
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB", flush=True)
        if options.card:
            write_figures(options.card, options.out, read_figures(options.figures, options.out))
            print(options.card)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _note(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: KEY=TEXT")
    if key in _NETWORKS or key == "training" or key.endswith("_training"):
        raise argparse.ArgumentTypeError(
            f"{text!r}; accepted: other keys than {', '.join(_NETWORKS)}, training and *_training, "
            "which say what the file holds"
        )
    return key, value


if __name__ == "__main__":
    sys.exit(main())
