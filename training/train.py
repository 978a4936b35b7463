"""Train the refiner: ``python -m training.train --data DIR --out DIR``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
import yaml

from inference.model.refiner import Refiner, RefinerConfig
from training.config import Config
from training.dataset import EpisodeSampler, load_folder
from training.trainer import Trainer


def main() -> None:
    """Parse the command line and train to the end of the schedule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML; defaults: training/config.py")
    parser.add_argument("--data", type=Path, required=True, help="folder of npz with imgs and gts")
    parser.add_argument("--label-maps", type=Path, help="folder of npz with gts only, painted")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints go here")
    parser.add_argument("--init", type=Path, help="start from the average of this checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = Config.load(args.config, args.set)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.yaml").write_text(
        yaml.safe_dump(dataclasses.asdict(config)), encoding="utf-8"
    )
    torch.manual_seed(config.seed)
    model = Refiner(RefinerConfig()).to(args.device)
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True)["average"])
    volumes = load_folder(args.data, args.device)
    maps = load_folder(args.label_maps, args.device) if args.label_maps else []
    print(f"{len(volumes)} volumes, {sum(len(v.objects) for v in volumes)} objects", flush=True)
    checkpoint = args.out / "checkpoint.pt"
    resuming = args.resume and checkpoint.exists()
    # A resumed run draws other windows than before the interruption.
    rng = np.random.default_rng((config.seed, int(checkpoint.stat().st_mtime) if resuming else 0))
    trainer = Trainer(model, EpisodeSampler(volumes, maps, config, rng), config, args.out)
    if resuming:
        trainer.resume(checkpoint)
    trainer.run()


if __name__ == "__main__":
    main()
