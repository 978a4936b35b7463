"""Train the refiner or SAM-Med3D: ``python -m training.train --data DIR --out DIR``.

On several GPUs: ``torchrun --nproc-per-node N -m training.train ...``; ``batch`` is of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from inference.memory import is_out_of_memory, keep_freed_memory
from inference.whole_file import replacing
from training.checkpoint import build_network
from training.config import Config
from training.coreset import read_case_list
from training.dataset import WindowDataset
from training.distributed import World, joined
from training.initial_weights import initialise
from training.trainer import Trainer
from training.volumes import load_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train; 0 at the end, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML, see training/configs; its defaults else")
    parser.add_argument("--data", type=Path, required=True, help="folder of npz with imgs and gts")
    parser.add_argument("--cases", type=Path, help="case list: which of them, see training.coreset")
    parser.add_argument("--label-maps", type=Path, help="folder of npz with gts only, painted")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint and log go here")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt if any")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after N more steps")
    parser.add_argument("--init", help="start from this checkpoint, weights file or weights/NAME")
    parser.add_argument(
        "--new",
        nargs="*",
        action="extend",
        default=[],
        metavar="NAME",
        help="parameters that --init may lack: beginnings of their names; they start at random",
    )
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads {options.threads}; accepted: at least 1")
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    try:
        config = Config.load(options.config, options.set)
        config = dataclasses.replace(config, init=options.init or config.init)
        with joined(options.device) as world:
            _train(options, config, world)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: memory of {options.device} is full ({str(error).splitlines()[0]}); accepted: "
            "a smaller batch (with a larger accumulate), smaller windows, or another device",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace, config: Config, world: World) -> None:
    """Load everything, then run."""
    checkpoint = options.out / "checkpoint.pt"
    resuming = options.resume and checkpoint.is_file()
    if checkpoint.is_file() and not resuming:
        raise ValueError(f"{checkpoint} is there already; accepted: --resume, or another --out")
    say = print if world.first else _silent
    torch.manual_seed(config.seed)
    model = build_network(config).to(world.device)
    if config.init and not resuming:
        # A run that never shows a box goes on from the network that never saw one.
        fresh = initialise(model, config.init, options.new, unboxed=config.no_box == 1)
        if fresh:
            say(f"{len(fresh)} parameters start at random: {', '.join(fresh)}")
    cases = read_case_list(options.cases) if options.cases else None
    volumes = load_folder(options.data, cases)
    if options.label_maps:
        maps = load_folder(options.label_maps)
        if shown := [volume.name for volume in maps if volume.image is not None]:
            raise ValueError(
                f"{options.label_maps}: {shown[0]} has imgs; accepted: label maps alone, whose "
                "images are painted"
            )
        volumes += maps
    dataset = WindowDataset(volumes, config, "cpu" if config.workers else world.device)
    trainer = Trainer(model, dataset, config, options.out, world)
    say(
        f"{len(volumes)} volumes, {dataset.objects} objects, "
        f"{dataset.store.bytes / 1e6:.0f} MB on {dataset.store.device}; {trainer.steps} steps",
        flush=True,
    )
    if dataset.never_shown:
        say(f"never shown, their modality having no weight: {', '.join(dataset.never_shown)}")
    if resuming:
        trainer.resume(checkpoint)
        say(f"going on from step {trainer.step}", flush=True)
    if world.first:
        options.out.mkdir(parents=True, exist_ok=True)
        with replacing(options.out / "config.yaml") as file:
            file.write(yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
    world.wait()
    trainer.run(options.max_steps)


def _device(text: str) -> str:
    """A device that is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is not None and device.type == "cpu":
        return text
    count = torch.cuda.device_count()
    if device is None or device.type != "cuda" or (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(
            f"{text}; accepted: cpu, or cuda where torch finds GPUs (here {count})"
        )
    return text


def _silent(*words: object, flush: bool = False) -> None:
    """What the processes behind the first one have to say."""


if __name__ == "__main__":
    sys.exit(main())
