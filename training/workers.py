"""The refiner's objects in processes of their own, so that a GPU need not wait for its windows."""

from __future__ import annotations

import math
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from inference.model.refiner import CHANNELS
from training.config import Config
from training.dataset import WindowDataset
from training.pool import Batch, Pool, Score, objects_drawn

_ENDED = "a worker has ended; was there memory enough?"


@dataclass
class _Shared:
    """Memory of a worker and the process that has the network: a turn's input and its answer."""

    channels: Tensor  # float16: the network computes in such a format anyway
    targets: Tensor
    beyond: Tensor
    logits: Tensor

    @classmethod
    def for_places(cls, places: int, edge: int) -> _Shared:
        """Room for windows of up to ``edge``^3 cells."""
        cells = places * edge**3

        def room(n: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(n, dtype=kind).share_memory_()

        return cls(
            room(cells * len(CHANNELS), torch.float16),
            room(cells, torch.bool),
            room(cells, torch.bool),
            room(cells, torch.float32),
        )

    def pin(self, wanted: bool) -> None:
        """Keep it where a GPU can fetch it by itself, or no longer."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for room in (self.channels, self.targets, self.beyond, self.logits):
            place = room.data_ptr()
            code = (
                runtime.cudaHostRegister(place, room.nbytes, 0)
                if wanted
                else runtime.cudaHostUnregister(place)
            )
            torch.cuda.check_error(int(code))

    def input(self, n: int, edge: int) -> Tensor:
        """(n, C, edge, edge, edge), the first part of it."""
        return _part(self.channels, (n, len(CHANNELS), edge, edge, edge))

    def answer(self, n: int, edge: int) -> Tensor:
        """(n, edge, edge, edge) logits."""
        return _part(self.logits, (n, edge, edge, edge))


def _part(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    return room[: math.prod(shape)].view(shape)


@dataclass
class _Worker:
    """A worker as the process with the network sees it."""

    process: BaseProcess
    pipe: Connection
    shared: _Shared
    places: int
    drawn: dict[int, int]
    edge: int = 0  # of the turn that it is at


class Workers:
    """Pools of objects, each in a process on a CPU core; turns begin as soon as they can.

    A pass of the network takes the workers that are ready first, so that none waits for the
    slowest; which ones they are follows from the machine, and a run is not reproducible to the
    bit. The processes begin with the first pass after this or :meth:`close`.

    Args:
        dataset: where objects come from, on the CPU.
        config: of the run; ``batch`` windows are a pass of the network.
        slots: of each worker's places among those of all processes.
        total: places of all processes.
    """

    def __init__(
        self, dataset: WindowDataset, config: Config, slots: Sequence[Sequence[int]], total: int
    ) -> None:
        """Nothing runs yet."""
        self._dataset, self._config = dataset, config
        self._slots, self._total = slots, total
        self._drawn = 0  # objects of each place before this process
        self._workers: list[_Worker] = []
        self._ready: list[_Worker] = []  # with a batch of theirs
        self._turn: list[_Worker] = []
        self._scores: list[Score] = []
        self._next: tuple[int, dict[str, float]] = (0, {})
        self._pinned = False

    def batch(
        self,
        edge: int,
        dice: Mapping[str, float],
        predict: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> Batch:
        """The next pass's input, once enough workers are ready.

        Args:
            edge: of windows that begin from now on, in cells.
            dice: mean Dice of each dataset so far.
            predict: what the network says to first looks, (n, C, D, H, W) to (n, D, H, W).
            device: of the network.

        Raises:
            ValueError: a worker has ended, or found no window.
            OSError: there is too little shared memory for all workers.
        """
        self._next = (edge, dict(dice))
        if not self._workers:
            self._start(device)
        while True:
            known = [worker for worker in self._ready if worker.edge == edge]
            for worker in self._ready:  # the schedule has left them behind
                if worker.edge != edge:
                    self._go_on(worker, "turn")
            self._ready = known
            wanted = self._config.batch // self._workers[0].places
            if len(known) >= wanted:
                break
            self._serve(predict, device)
        self._turn, self._ready = known[:wanted], known[wanted:]

        def together(name: str) -> Tensor:
            parts = [
                _part(getattr(w.shared, name), (w.places, edge, edge, edge)) for w in self._turn
            ]
            return torch.cat([part.to(device, non_blocking=True) for part in parts])

        inputs = [w.shared.input(w.places, edge) for w in self._turn]
        channels = torch.cat([part.to(device, non_blocking=True) for part in inputs]).float()
        return Batch(channels, together("targets"), together("beyond"))

    def advance(self, logits: Tensor) -> list[Score]:
        """Tell the pass's workers what the network said; the scores that came in meanwhile."""
        for worker, part in zip(self._turn, logits.split(self._turn[0].places), strict=True):
            worker.shared.answer(*part.shape[:2]).copy_(part)
            self._go_on(worker, "said")
        self._turn = []
        scores, self._scores = self._scores, []
        return scores

    def state(self) -> dict[str, Any]:
        """How many objects there were; those in the workers are left behind."""
        drawn = {slot: n for worker in self._workers for slot, n in worker.drawn.items()}
        first = dict.fromkeys((slot for row in self._slots for slot in row), self._drawn)
        return {"total": self._total, "drawn": {**first, **drawn}, "pool": {}}

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on with new objects from where :meth:`state` or a pool's state was."""
        self._drawn = objects_drawn(states, self._total)

    def close(self) -> None:
        """End the processes and their objects."""
        self._drawn = objects_drawn([self.state()], self._total)
        for worker in self._workers:
            worker.process.terminate()
            worker.process.join()
            worker.pipe.close()
            if self._pinned:
                worker.shared.pin(False)
        self._workers, self._ready, self._turn = [], [], []

    def _start(self, device: torch.device) -> None:
        """Begin the processes: copies of this one, which share its volumes.

        They compute on the CPU alone, so that they may be copied while CUDA is in use.
        """
        context = multiprocessing.get_context("fork")
        largest = max(edge for _, edge in self._config.windows)
        sys.stdout.flush()
        for row in self._slots:
            try:
                shared = _Shared.for_places(len(row), largest)
            except RuntimeError as error:  # torch's, where there is no more
                had = f"{len(self._workers)} of {len(self._slots)} workers have"
                raise OSError(
                    f"{had} shared memory ({error}); accepted: fewer workers, or a larger /dev/shm"
                ) from None
            here, there = context.Pipe()
            pool = Pool(self._dataset, self._config, row, self._total)
            pool.drawn = dict.fromkeys(row, self._drawn)
            ours = [*(worker.pipe for worker in self._workers), here]
            process = context.Process(target=_work, args=(there, ours, shared, pool), daemon=True)
            process.start()
            there.close()
            if device.type == "cuda":
                shared.pin(True)
            self._workers.append(_Worker(process, here, shared, len(row), pool.drawn))
        self._pinned = device.type == "cuda"
        for worker in self._workers:
            self._go_on(worker, "turn")

    def _go_on(self, worker: _Worker, what: str) -> None:
        """Have a worker begin a turn, the last one's answer lying ready if that was "said"."""
        worker.edge = self._next[0]
        _tell(worker, what, self._next)

    def _serve(self, predict: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Hear the workers that have something to say, and answer their first looks together."""
        asking: list[tuple[_Worker, int]] = []
        for pipe in wait([worker.pipe for worker in self._workers]):
            worker = next(worker for worker in self._workers if worker.pipe is pipe)
            try:
                what, value = worker.pipe.recv()
            except (EOFError, OSError) as error:
                raise ValueError(_ENDED) from error
            if what == "error":
                raise ValueError(f"a worker failed: {value}")
            if what == "first":
                asking.append((worker, value))
            else:
                worker.drawn, scores = value
                self._scores += scores
                self._ready.append(worker)
        if not asking:
            return
        inputs = [w.shared.input(n, w.edge).to(device, non_blocking=True) for w, n in asking]
        for edge in {w.edge for w, _ in asking}:
            some = [i for i, (w, _) in enumerate(asking) if w.edge == edge]
            logits = predict(torch.cat([inputs[i] for i in some]).float())
            for i, part in zip(some, logits.split([asking[i][1] for i in some]), strict=True):
                worker, n = asking[i]
                worker.shared.answer(n, edge).copy_(part)
                _tell(worker, "first")


def _tell(worker: _Worker, *message: object) -> None:
    try:
        worker.pipe.send(message)
    except OSError as error:
        raise ValueError(_ENDED) from error


def _work(pipe: Connection, theirs: Sequence[Connection], shared: _Shared, pool: Pool) -> None:
    """A worker's life: turns of its pool until the other process is gone.

    Args:
        pipe: to the other process.
        theirs: that one's ends of all pipes so far. As long as a copy of its end is open anywhere,
            a worker never hears that it is gone.
        shared, pool: memory and objects.
    """
    for end in theirs:
        end.close()
    torch.set_num_threads(1)
    try:
        _turns(pipe, shared, pool)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except Exception as error:  # it is told where it can be seen
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _turns(pipe: Connection, shared: _Shared, pool: Pool) -> None:
    row, scores, before = list(pool.drawn), [], 0
    while True:
        what, (edge, dice) = pipe.recv()
        if what == "said":
            scores = pool.advance(shared.answer(len(row), before).clone())
        before = edge
        first = pool.first_pass(row, edge, dice)
        logits = None
        if first is not None:
            shared.input(len(first), edge).copy_(first)
            pipe.send(("first", len(first)))
            pipe.recv()
            logits = shared.answer(len(first), edge).clone()
        batch = pool.batch(logits)
        shared.input(len(row), edge).copy_(batch.channels)
        for name in ("targets", "beyond"):
            values = getattr(batch, name)
            _part(getattr(shared, name), tuple(values.shape)).copy_(values)
        pipe.send(("ready", (pool.drawn, scores)))
        scores = []
