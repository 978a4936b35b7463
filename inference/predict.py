"""Command line: segments every case of a folder.

Each ``.npz`` of the inputs folder is read, segmented, post-processed and saved under the same name
in the outputs folder. A case that fails never stops the others and leaves an earlier output as it
was. Exit status: 0 all cases written, 1 some case failed, 2 nothing could start.

Imports are lazy: ``--help`` and wrong arguments answer at once, and each start in the challenge
(six a case) pays for torch and for nothing else it does not use.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from inference.case import Case
    from inference.finishing import Finisher
    from inference.segmenter import Segmenter

ALL_WRITTEN, SOME_FAILED, NOT_STARTED = 0, 1, 2
_MOST_THREADS = 1024


class StartError(Exception):
    """Nothing could start; the message is one line for the user."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; it exits with status 2 and a message where one is wrong."""
    parser = argparse.ArgumentParser(
        prog="predict.sh",
        description="Segment every .npz case of a folder. Exit status: 0 all cases written, "
        "1 some case failed, 2 nothing could start.",
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        default=Path("/workspace/inputs"),
        help="folder with the .npz cases (default: %(default)s)",
    )
    parser.add_argument(
        "--outputs",
        type=Path,
        default=Path("/workspace/outputs"),
        help="folder for the results, made if need be (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights of this project (refiner, optionally with a SAM-Med3D): a file, or a name in "
        "weights/ (default: default)",
    )
    parser.add_argument(
        "--sam",
        metavar="FILE",
        help="a SAM-Med3D checkpoint to run before the refiner: a file, or a name in weights/",
    )
    parser.add_argument(
        "--refiner",
        choices=("on", "off"),
        default="on",
        help="off: SAM-Med3D alone, which --sam names (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU where one can compute, else the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--postprocess",
        choices=("off", "paper", "auto"),
        default="auto",
        help="off: none; paper: the five steps of the paper, which may undo clicks; auto: steps "
        "that a table of rules selects for each object (default: %(default)s)",
    )
    parser.add_argument(
        "--label-priority",
        action="store_true",
        help="where two classes overlap, give the voxel to the lower one, as in the paper "
        "(default: to the more probable one)",
    )
    parser.add_argument(
        "--save-probabilities",
        action="store_true",
        help="also store each class's probability and the uncertainty of its outline in the result",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        default=(1, 1),
        help="segment only the I-th of N shares of the cases, for N jobs on the same folders",
    )
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="skip cases that have a result already, whatever has changed since",
    )
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="CPU threads (default: as many as cores)"
    )
    parser.add_argument(
        "--overlay", type=Path, metavar="DIR", help="also draw each result as DIR/NAME.png"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Segment a folder as the command line says; returns the exit status."""
    options = make_parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        paths, skipped = find_work(options)
        if not paths:  # torch need not be imported to say so
            write_line(
                f"0 of 0 cases{note_skipped(skipped)}; results in {options.outputs}", sys.stdout
            )
            return ALL_WRITTEN
        segment_file = load(options)
        bar, write = _progress(paths)
    except StartError as error:
        write_line(f"error: {error}", sys.stderr)
        return NOT_STARTED
    start_up = time.perf_counter() - started

    failed = 0
    for path in bar:
        try:
            line = segment_file(path)
        except Exception as error:
            failed += 1
            write(f"error: {in_one_line(path, error)}", sys.stderr)
        else:
            write(line, sys.stdout)
            continue
        # Out here the exception is gone, and with it the tensors its traceback held.
        from inference.memory import release_memory

        release_memory()

    write_line(
        f"{len(paths) - failed} of {len(paths)} cases in {time.perf_counter() - started:.1f} s "
        f"({start_up:.1f} s start-up){note_skipped(skipped)}; results in {options.outputs}"
        + (f", overlays in {options.overlay}" if options.overlay is not None else ""),
        sys.stdout,
    )
    return SOME_FAILED if failed else ALL_WRITTEN


def find_work(options: argparse.Namespace) -> tuple[list[Path], int]:
    """The cases to segment, in the order of their names, and how many have their result already.

    Of shard I/N these are the I-th, the (I + N)-th and so on, counted from 1: the N shards share
    all cases among them; one may be empty.

    Raises:
        StartError: no case in the inputs folder, or a folder that cannot be written.
    """
    paths = _list_cases(options.inputs)
    for folder in (options.outputs, options.overlay):
        if folder is not None:
            _prepare_folder(folder, options.inputs)
    number, total = options.shard
    paths = paths[number - 1 :: total]
    if not options.skip_existing:
        return paths, 0
    left = [path for path in paths if not (options.outputs / path.name).exists()]
    return left, len(paths) - len(left)


def _list_cases(inputs: Path) -> list[Path]:
    try:
        names = sorted(inputs.iterdir())
    except OSError as error:
        raise StartError(f"inputs folder {inputs}: {error.strerror}") from error
    paths = [path for path in names if path.suffix == ".npz" and not path.name.startswith(".")]
    if not paths:
        raise StartError(f"inputs folder {inputs}: no .npz file among {len(names)} entries")
    return paths


def _prepare_folder(folder: Path, inputs: Path) -> None:
    """Make the folder and make sure now, not after minutes of work, that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(inputs):
            raise StartError(f"{folder} is the inputs folder: results would replace the cases")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StartError(f"cannot write to {folder}: {error.strerror}") from error


def load(options: argparse.Namespace) -> Callable[[Path], str]:
    """Load what the options ask for; the function segments a file and returns the line to print.

    Raises:
        StartError: it cannot be loaded; the message says why.
    """
    try:
        segmenter = _build_segmenter(options)
        finisher = _build_finisher(options)
    except ImportError as error:
        raise _lacking(error) from error
    except OSError as error:  # torch lacks a library of the system
        raise StartError(" ".join(str(error).split())) from error
    return lambda path: _segment_file(path, segmenter, finisher, options)


def _lacking(error: ImportError) -> StartError:
    said = " ".join(str(error).split())  # numpy says it in paragraphs
    return StartError(f"{said}; {sys.executable} -m pip install -r requirements.txt")


def _build_segmenter(options: argparse.Namespace) -> Segmenter:
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)

    from inference.segmenter import Segmenter

    try:
        return Segmenter.from_files(
            _find_weights(options.weights),
            sam=_find_weights(options.sam),
            refiner=options.refiner == "on",
            device=options.device,
        )
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise StartError(kind + " ".join(str(error).split())) from error


def _build_finisher(options: argparse.Namespace) -> Finisher:
    from inference.finishing import Finisher

    try:
        return Finisher(options.postprocess, options.label_priority, options.save_probabilities)
    except (ValueError, OSError) as error:
        raise StartError(str(error)) from error


def _find_weights(name: str | None) -> Path | None:
    if name is None:
        return None
    from inference.model.weights import find_weights

    return find_weights(name)


def _segment_file(
    path: Path, segmenter: Segmenter, finisher: Finisher, options: argparse.Namespace
) -> str:
    """Segment one file and save the result; returns the line that reports it."""
    from inference.case import load_case
    from inference.output import save_segmentation

    started = time.perf_counter()
    case = load_case(path)
    label_map = segmenter.segment_case(case, finisher)
    more = None if finisher.probabilities is None else finisher.probabilities.arrays()
    if options.overlay is not None:  # before the result, or a case would fail that has one
        from inference.overlay import draw_overlay, save_png

        picture = draw_overlay(case.image, label_map, case.spacing_mm)
        save_png(options.overlay / f"{path.stem}.png", picture)
    save_segmentation(options.outputs / path.name, label_map, more)
    seconds = time.perf_counter() - started
    return _report(case, label_map, seconds, str(segmenter.used_device))


def _report(case: Case, label_map: NDArray[np.uint8], seconds: float, device: str) -> str:
    from inference.output import label_voxels

    voxels = label_voxels(label_map)
    labels = [prompts.label for prompts in case.objects]
    counts = " ".join(f"{label}:{voxels[label]}" for label in labels)
    shape = "x".join(str(size) for size in label_map.shape)
    classes = f"{len(labels)} class{'es' * (len(labels) != 1)}"
    line = f"{case.name}: {shape}, {classes}, {seconds:.2f} s, {device}, voxels {counts}"
    return "; ".join((line, *case.notes))


def _progress(paths: list[Path]) -> tuple[Iterable[Path], Callable[[str, TextIO], None]]:
    """The paths, under a progress bar on a terminal, and how to print a line beside it."""
    if sys.stderr is None or not sys.stderr.isatty():
        return paths, write_line
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise _lacking(error) from error

    def beside(line: str, stream: TextIO) -> None:
        with tqdm.external_write_mode(file=stream):
            write_line(line, stream)

    return tqdm(paths, unit="case"), beside


def write_line(line: str, stream: TextIO | None) -> None:
    """Print a line; where it cannot be (nobody reads, the disk is full), go on in silence."""
    line = "".join(c if c.isprintable() else "?" for c in line)  # a name may hold a line's end
    if stream is None:  # closed before the start; print would take stdout for it
        return
    try:
        print(line, file=stream, flush=True)
    except OSError:
        # What the buffer holds would fail once more at the end, and change the exit status.
        with contextlib.suppress(OSError), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except ValueError:  # closed since
        pass


def in_one_line(path: Path, error: Exception) -> str:
    """What went wrong, naming the file; the kind of error too where the input is not to blame."""
    from inference.case import CaseError

    message = " ".join(str(error).split())
    if not isinstance(error, CaseError):
        message = f"{type(error).__name__}: {message}"
    return message if path.name in message else f"{path.name}: {message}"


def note_skipped(number: int) -> str:
    """What a summary says of cases that were left out."""
    return f", {number} skipped" if number else ""


def _shard(text: str) -> tuple[int, int]:
    try:
        number, total = (int(part) for part in text.split("/"))
    except ValueError:
        number = total = 0
    if not 1 <= number <= total:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: I/N with 1 <= I <= N, such as 2/8")
    return number, total


def _threads(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: 1 to {_MOST_THREADS}")
    return number


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a command line and end the process with its status, or with 128 + a signal's number.

    Python's own answer to SIGTERM ends the process where it stands; this one unwinds, so that
    temporary files are removed.
    """
    # A closed standard stream's number would go to the next file opened, such as a result, and what
    # libraries print would go into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run_program(main)
