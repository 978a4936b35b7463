"""Measure one step of a configuration here, and say what the whole run would need.

    python -m training.needs --config training/configs/paper.yaml --data DIR \
        [--objects N] [--tflops 125]

One optimiser step with one window and one with two are taken on this machine. Their peaks of
memory give what a window costs and what is needed anyway; counted floating-point operations give
what a run costs on a machine whose sustained rate is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from training.checkpoint import build_network
from training.config import Config
from training.dataset import WindowDataset
from training.peak_memory import peak_bytes, start_peak
from training.trainer import Trainer, steps_an_epoch
from training.volumes import LabelledVolume, load_folder

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


#: PyTorch counts attention on GPUs only.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class Step:
    """What one optimiser step took.

    Attributes:
        windows: in it.
        seconds: of wall clock.
        cpu_seconds: of all threads.
        flops: floating-point operations of matrix products and convolutions, both directions.
        peak_gb: the process's largest memory meanwhile.
    """

    windows: int
    seconds: float
    cpu_seconds: float
    flops: int
    peak_gb: float


def measure_step(config: Config, volumes: Sequence[LabelledVolume], batch: int) -> Step:
    """Take one optimiser step of ``batch`` windows without accumulation, on the CPU.

    This process does all of it, as only its own time and memory are measured.

    Raises:
        ValueError: the data or the configuration cannot be used.
    """
    config = dataclasses.replace(config, batch=batch, accumulate=1, workers=0)
    torch.manual_seed(config.seed)
    dataset = WindowDataset(volumes, config)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(build_network(config), dataset, config, Path(out))
        start_peak()  # reading the data may have taken more
        counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
        begun, begun_cpu = time.perf_counter(), time.process_time()
        with counter:
            trainer.take_step()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    if trainer.skipped:
        raise ValueError("the step had no finite loss and gradient; accepted: another seed")
    return Step(batch, seconds, cpu, counter.get_total_flops(), peak_bytes() / 1e9)


def report(config: Config, one: Step, two: Step, objects: int, tflops: float) -> str:
    """The measured figures, and what follows for the configuration's full size.

    Args:
        config: of the full run.
        one, two: steps of one and two windows, in this order in one process.
        objects: of an epoch.
        tflops: sustained 10^12 operations a second of the machine to reckon for.
    """
    window = max(two.peak_gb - one.peak_gb, 0.0)
    fixed = one.peak_gb - window
    step = config.batch * config.accumulate
    steps = config.epochs * steps_an_epoch(config, objects) or config.steps
    total = steps * step
    flops = one.flops / one.windows
    days = total * flops / (tflops * 1e12) / 86400
    own = total * two.cpu_seconds / two.windows / 86400  # the first step also warms up
    return "\n".join(
        [
            f"measured here, {torch.get_num_threads()} threads:",
            *(
                f"  a step of {s.windows}: {s.seconds:.1f} s ({s.cpu_seconds:.1f} s of CPU), "
                f"{s.flops / 1e12:.2f} TFLOP, peak memory {s.peak_gb:.2f} GB"
                for s in (one, two)
            ),
            f"  so {fixed:.2f} GB anyway and {window:.2f} GB a window",
            f"full size, batch {config.batch} x {config.accumulate}, {steps} steps of {step} "
            f"windows ({objects} objects an epoch):",
            f"  memory {fixed + config.batch * window:.1f} GB, as measured (no checkpointing)",
            f"  {total * flops / 1e18:.2f} EFLOP: {days:.2g} days at {tflops:g} TFLOP/s sustained "
            f"and nothing else in the way, {own:.0f} days on one core of this machine",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure and print; 0, or 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m training.needs", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of npz with imgs and gts")
    parser.add_argument("--objects", type=int, help="of the full data set; default: of DIR")
    parser.add_argument(
        "--tflops", type=float, default=125.0, help="sustained; 125 is 40 %% of an A100's bf16"
    )
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    for name in ("objects", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}; accepted: at least 1")
    if not 0 < options.tflops < math.inf:
        parser.error(f"--tflops {options.tflops}; accepted: a finite number above 0")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        config = Config.load(options.config, options.set)
        volumes = load_folder(options.data)
        objects = options.objects or sum(len(v.objects) for v in volumes)
        one, two = (measure_step(config, volumes, batch) for batch in (1, 2))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(config, one, two, objects, options.tflops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
