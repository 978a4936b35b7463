"""Predictors: whatever turns one round's input into a label map, timed.

All of them see exactly the same arrays: those a challenge file of that round holds.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from inference.case import Case, parse_case
from inference.finishing import DEFAULT, Finisher
from inference.npz import NpzFile
from training.evaluation.metrics import SECONDS_PER_CLASS
from training.peak_memory import peak_bytes, start_peak

Arrays = Mapping[str, NDArray[Any]]


class Prediction(NamedTuple):
    """A label map (D, H, W) and what it cost; memory is None where it cannot be measured."""

    segs: NDArray[np.uint8]
    seconds: float
    peak_bytes: int | None


class PredictionError(Exception):
    """No label map came back; the message says why.

    Attributes:
        seconds: what it cost all the same.
    """

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        """Say why, and what it cost."""
        super().__init__(message)
        self.seconds = seconds


class Predictor(Protocol):
    """Segments one round of one case."""

    def __call__(self, arrays: Arrays, name: str) -> Prediction:
        """Segment.

        Args:
            arrays: imgs, spacing and, where this round has them, boxes, clicks, clicks_order and
                prev_pred, as the challenge's files hold them.
            name: the case's file name.

        Raises:
            PredictionError: no usable label map.
        """


class InProcess:
    """A function of a case, called in this process."""

    def __init__(self, segment: Callable[[Case], NDArray[np.uint8]]) -> None:
        """Wrap ``segment``: Case -> (D, H, W) labels."""
        self._segment = segment

    def __call__(self, arrays: Arrays, name: str) -> Prediction:
        """See :class:`Predictor`; parsing is timed too, reading and writing files is not."""
        measurable = start_peak()
        started = time.perf_counter()
        try:
            segs = self._segment(parse_case(arrays, name))
        except Exception as error:  # one bad case must not end the run
            seconds = time.perf_counter() - started
            raise PredictionError(f"{type(error).__name__}: {error}", seconds) from error
        seconds = time.perf_counter() - started
        peak = peak_bytes() if measurable else None
        return Prediction(_checked(segs, arrays["imgs"].shape, seconds), seconds, peak)


class Command:
    """A command that reads an inputs folder and writes an outputs folder, one process a round."""

    def __init__(self, command: str) -> None:
        """Take a command line with ``{inputs}`` and ``{outputs}`` where the folders belong.

        Args:
            command: split as a shell would, but run without one.
        """
        if "{inputs}" not in command or "{outputs}" not in command:
            raise ValueError(f"command {command!r}; accepted: one with {{inputs}} and {{outputs}}")
        self._command = command

    def __call__(self, arrays: Arrays, name: str) -> Prediction:
        """See :class:`Predictor`; only the process is timed, from its start to its end.

        One that takes longer than all rounds of the case may is stopped: its scores are 0 by then.
        """
        limit = SECONDS_PER_CLASS * len(arrays["boxes" if "boxes" in arrays else "clicks"])
        with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
            inputs, outputs, log = (Path(folder, part) for part in ("inputs", "outputs", "log"))
            for place in (inputs, outputs):
                place.mkdir()
                place.chmod(0o777)  # a container's user is another
            np.savez_compressed(inputs / name, allow_pickle=True, **arrays)
            (inputs / name).chmod(0o644)  # whatever the umask
            words = [
                word.replace("{inputs}", str(inputs)).replace("{outputs}", str(outputs))
                for word in shlex.split(self._command)
            ]
            seconds, peak, status = self._run(words, log, limit)
            written = outputs / name
            if not written.is_file():
                if seconds >= limit:
                    raise PredictionError(
                        f"stopped after {seconds:.0f} s, no {name} written", seconds
                    )
                tail = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
                raise PredictionError(f"exit status {status}, no {name} written: {tail}", seconds)
            try:
                with NpzFile(written) as file:
                    segs = file["segs"]
            except (ValueError, KeyError, OSError) as error:
                raise PredictionError(f"output {name}: {error}", seconds) from error
            return Prediction(_checked(segs, arrays["imgs"].shape, seconds), seconds, peak)

    def _run(self, words: list[str], log: Path, limit: float) -> tuple[float, int | None, int]:
        """Seconds, peak resident bytes of the largest process, and exit status."""
        with log.open("wb") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )
            alarm = threading.Timer(limit, self._stop, [process.pid])
            alarm.start()
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                self._stop(process.pid)
                process.wait()
                raise
            finally:
                alarm.cancel()
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        return seconds, usage.ru_maxrss * 1024, process.returncode

    def _stop(self, group: int) -> None:
        """End a process and all it has started."""
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(group, signal.SIGKILL)


class Image(Command):
    """A container image, started as the challenge starts it."""

    def __init__(self, image: str, *, gpu: bool) -> None:
        """Run ``image``, with the first GPU where there is one."""
        self._name = f"evaluate-{uuid.uuid4().hex[:12]}"
        super().__init__(
            "docker container run "
            + ("--gpus device=0 " if gpu else "")
            + f"-m 32G --name {self._name} --rm "
            "-v {inputs}/:/workspace/inputs/ -v {outputs}/:/workspace/outputs/ "
            f'{shlex.quote(image)} /bin/bash -c "sh predict.sh"'
        )

    def _run(self, words: list[str], log: Path, limit: float) -> tuple[float, int | None, int]:
        seconds, _, status = super()._run(words, log, limit)
        return seconds, None, status  # the client's memory says nothing about the container's

    def _stop(self, group: int) -> None:
        """End the container, which the client's end would not."""
        subprocess.run(["docker", "container", "kill", self._name], capture_output=True)
        super()._stop(group)


def image_id(image: str) -> str:
    """What an image's name stands for now: the identifier of its content.

    Raises:
        ValueError: there is no such image, or nothing to ask for it.
    """
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", image]
    try:
        asked = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"image {image}: docker: {error.strerror}") from error
    if asked.returncode:
        raise ValueError(f"image {image}: {' '.join(asked.stderr.split())[:300]}")
    return asked.stdout.strip()


@dataclass(frozen=True)
class PredictorChoice:
    """Which predictor, as the command line names it; sent to every worker, which builds its own.

    Attributes:
        kind: ``segmenter``, ``command``, ``image`` or the name of a baseline.
        weights: bundle of the segmenter; what ships by default.
        sam: SAM-Med3D checkpoint of the segmenter.
        refiner: False: SAM-Med3D alone.
        device: ``auto``, ``cpu`` or ``cuda``.
        postprocess: kind of the segmenter's post-processing.
        command: command line of ``command``.
        image: image name of ``image``.
    """

    kind: str
    weights: Path | None = None
    sam: Path | None = None
    refiner: bool = True
    device: str = "auto"
    postprocess: str = DEFAULT
    command: str | None = None
    image: str | None = None


def build_predictor(choice: PredictorChoice) -> Predictor:
    """Build what ``choice`` names; weights are read here, once."""
    if choice.kind == "command":
        if choice.command is None:
            raise ValueError("predictor command needs --command")
        return Command(choice.command)
    if choice.kind == "image":
        if choice.image is None:
            raise ValueError("predictor image needs --image")
        import torch

        return Image(choice.image, gpu=torch.cuda.is_available())
    if choice.kind == "segmenter":
        return InProcess(_segmenter(choice))
    from training.evaluation.baselines import BASELINES

    if choice.kind not in BASELINES:
        accepted = ", ".join(["segmenter", "command", "image", *BASELINES])
        raise ValueError(f"predictor {choice.kind!r}; accepted: {accepted}")
    return InProcess(BASELINES[choice.kind])


def check_choice(choice: PredictorChoice, jobs: int) -> None:
    """Find out now what would stop ``jobs`` processes, which cannot say why they end.

    Raises:
        ValueError, OSError: what ``choice`` names cannot be built.
    """
    if choice.device == "cuda":
        from inference.precision import choose_device

        choose_device(choice.device)
    # A single job builds networks in this process, whose memory is measured: not here, too.
    if choice.kind != "segmenter" or jobs > 1:
        build_predictor(replace(choice, device="cpu"))


def _segmenter(choice: PredictorChoice) -> Callable[[Case], NDArray[np.uint8]]:
    from inference.segmenter import Segmenter

    segmenter = Segmenter.from_files(
        choice.weights, sam=choice.sam, refiner=choice.refiner, device=choice.device
    )
    finisher = Finisher(choice.postprocess)
    return lambda case: segmenter.segment_case(case, finisher)


def _checked(segs: NDArray[Any], shape: tuple[int, ...], seconds: float) -> NDArray[np.uint8]:
    if segs.shape != shape:
        raise PredictionError(f"segs of shape {segs.shape}; accepted: {shape}", seconds)
    if segs.dtype == np.uint8:
        return segs
    labels = segs.astype(np.uint8)
    if not np.array_equal(labels, segs):
        raise PredictionError(f"segs of {segs.dtype} beyond uint8; accepted: 0 to 255", seconds)
    return labels
