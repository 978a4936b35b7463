"""Write a checkpoint's averaged refiner as a weights file that inference reads.

``python -m training.export --checkpoint RUN/checkpoint.pt --out weights/default.safetensors``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from inference.model.refiner import Refiner, RefinerConfig, load_refiner
from inference.model.weights import save_weights


def export(checkpoint: Path, out: Path, notes: dict[str, str]) -> None:
    """Store the exponential moving average in half precision, with what it is and how it came.

    Args:
        checkpoint: written by ``training/trainer.py``.
        out: ends in ``.safetensors``.
        notes: further metadata, such as data and figures.
    """
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    config = RefinerConfig.from_json(json.dumps(state["refiner"]))
    model = Refiner(config)
    model.load_state_dict(state["average"])
    metadata = {
        "refiner": config.to_json(),
        "training": json.dumps(
            {
                "config": state["config"],
                "steps": state["step"],
                "windows": state["windows"],
                "minutes": round(state["minutes"], 1),
            }
        ),
        **notes,
    }
    tensors = {f"refiner.{name}": tensor for name, tensor in model.state_dict().items()}
    save_weights(out, tensors, metadata, dtype=torch.float16)
    load_refiner(out)  # what was written can be read


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", nargs="*", default=[], metavar="KEY=TEXT")
    args = parser.parse_args()
    export(args.checkpoint, args.out, dict(note.split("=", 1) for note in args.note))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
