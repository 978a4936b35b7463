"""The image encoder against the literal one that attends to every padded token.

    python -m tests.benchmarks.bench_encoder [--threads 2] [--repeats 5] [--device cpu]

One 128^3 window, random weights: the padded encoder in float32, ours in float32 and in bfloat16
autocast, in the same run; the fastest of some calls counts. CPU seconds stand beside the elapsed
ones: on a busy machine they are the ones to compare. Then what a cold start pays: the network
with random weights, and loaded from a file of each kind. The exit status is 1 where ours is less
than 10 times as fast as the padded one (vit_b_768, float32) or further than 1e-4 from it.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.model.sam_med3d import SamMed3D, build_sam_med3d, load_sam_med3d
from inference.model.weights import save_weights
from tests.model.padded_attention import padded_encoder

RESULTS = Path(__file__).resolve().parent / "results" / "encoder.csv"
NETWORKS = ("vit_b_768", "vit_b_384")


def random_network(name: str, device: torch.device) -> SamMed3D:
    """A network whose positions are not the zeros that a new one starts with."""
    torch.manual_seed(0)
    model = build_sam_med3d(name).eval()
    for key, parameter in model.image_encoder.named_parameters():
        if "rel_pos" in key or "pos_embed" in key:
            nn.init.normal_(parameter, std=0.2)
    return model.to(device)


def timed(function: Callable[[], Any], repeats: int, warm_up: bool) -> tuple[float, float, Any]:
    """Least elapsed and least CPU seconds of a call, and its last result."""
    if warm_up:
        function()
    elapsed, cpu = [], []
    for _ in range(repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_started)
    return min(elapsed), min(cpu), result


def encoder_rows(name: str, device: torch.device, repeats: int) -> list[dict[str, object]]:
    """Padded float32, ours in float32 and in bfloat16, each with its distance from the first."""
    model = random_network(name, device)
    image = torch.randn(1, 1, 128, 128, 128, device=device)

    def padded() -> Tensor:
        return padded_encoder(model.image_encoder, image)

    def ours() -> Tensor:
        return model.encode_image(image)

    def half() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model.encode_image(image)

    rows: list[dict[str, object]] = []
    base = cpu_base = expected = None
    for what, precision, function in (
        ("padded", "float32", padded),
        ("ours", "float32", ours),
        ("ours", "bfloat16", half),
    ):
        slow = function is padded
        times = max(2, repeats // 2) if slow else repeats
        seconds, cpu_seconds, result = timed(function, times, warm_up=not slow)
        if expected is None:
            base, cpu_base, expected = seconds, cpu_seconds, result
        difference = (result.float() - expected).abs().max().item()
        rows.append(
            {
                "network": name,
                "what": what,
                "precision": precision,
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),
                "ratio": round(base / seconds, 2),
                "cpu_ratio": round(cpu_base / cpu_seconds, 2),
                "max_difference": f"{difference:.2g}",
                "largest_output": f"{expected.abs().max().item():.3g}",
            }
        )
    return rows


def start_rows(name: str, repeats: int) -> list[dict[str, object]]:
    """Building with random weights, and loading from a file that the system has in memory."""
    model = build_sam_med3d(name)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {suffix: Path(folder) / f"w{suffix}" for suffix in (".safetensors", ".pth")}
        save_weights(paths[".safetensors"], model.state_dict(), {"sam": model.config.to_json()})
        torch.save({"model_state_dict": model.state_dict()}, paths[".pth"])
        base = None
        for what, function in (
            ("random weights", lambda: build_sam_med3d(name)),
            ("load .safetensors", lambda: load_sam_med3d(paths[".safetensors"])),
            ("load .pth", lambda: load_sam_med3d(paths[".pth"])),
        ):
            seconds, cpu_seconds, _ = timed(function, repeats, warm_up=True)
            base = base or seconds
            rows.append(
                {
                    "network": name,
                    "what": what,
                    "precision": "float32",
                    "seconds": round(seconds, 4),
                    "cpu_seconds": round(cpu_seconds, 4),
                    "ratio": round(base / seconds, 2),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="half of it for the padded one")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for name in NETWORKS:
            rows += encoder_rows(name, device, options.repeats)
    for name in NETWORKS:
        rows += start_rows(name, options.repeats)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    columns = list(rows[0])
    print("".join(f"{column:>18}" for column in columns))
    for row in rows:
        print("".join(f"{row.get(column, '')!s:>18}" for column in columns))
        row |= {"threads": options.threads, "torch": torch.__version__, "device": where}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"torch {torch.__version__}, {where}, {options.threads} threads; written to {RESULTS}")
    ours = rows[1]
    return 0 if ours["ratio"] >= 10 and float(ours["max_difference"]) < 1e-4 else 1


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
