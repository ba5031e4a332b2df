"""From files to files without PyTorch: threads read pieces and combine, reduce or merge them, this one writes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from logging import WARNING
from threading import Lock
from typing import Any, NamedTuple

from pymerge import env
from pymerge.backends.native import combine_files as native
from pymerge.backends.native import missing
from pymerge.backends.native.combine_files import FileTensor
from pymerge.checkpoint.reader import Reader, failed_read
from pymerge.common.arrays import Array
from pymerge.common.devices import Device
from pymerge.common.dtypes import ITEM_SIZES, NATIVE, is_float8
from pymerge.common.events import event
from pymerge.common.progress import ProgressSink
from pymerge.engine.raw_passes import RawPasses, can_take, working_bytes
from pymerge.engine.trace import StepLog, Times, Tracer
from pymerge.errors import OutOfMemoryError
from pymerge.output.directory import OutputDirectory
from pymerge.planner.jobs import READ_THREADS, Slot, alternating
from pymerge.planner.pieces import Piece
from pymerge.planner.steps import Step
from pymerge.planner.window import known_bytes, waiting

# Elements of each tensor that are read at once: so many that a system call costs little beside them, and so few that
# those of a base and several experts are still in a core's second-level cache when they are combined.
BLOCK_ELEMENTS = 2**16
_REASON = "files are merged in C++ as they are read"


def why_not(steps: Sequence[Step], device: Device, backend: str, *, allow_nonfinite: bool) -> str | None:
    """Why these steps need PyTorch; None if `Streams` can carry out all of them, on this device with this backend."""
    if device.type != "cpu" or backend not in ("auto", "native"):
        return f"backend {backend} on {device}"
    needs = next((step.name for step in steps if not (_is_sum(step, allow_nonfinite) or can_take(step))), None)
    return missing() if needs is None else f"{needs} is merged by ops that take tensors of PyTorch"


def _is_sum(step: Step, allow_nonfinite: bool) -> bool:
    combination, inputs = step.action.combination, step.inputs
    if combination is None or not all(entry.contiguous for entry in inputs):
        return False
    if combination.weights:
        return combination.on_base == step.reads_base and {step.dtype, *_dtypes(step)} <= NATIVE.keys()
    if len(inputs) != 1:
        return False
    if inputs[0].dtype == step.dtype:
        return not is_float8(step.dtype)
    # Which bits NaN has in another dtype differs between PyTorch and C++.
    return {step.dtype, *_dtypes(step)} <= NATIVE.keys() and not allow_nonfinite


def _dtypes(step: Step) -> list[str]:
    return [entry.dtype for entry in step.inputs]


class Streams:
    """Carries out steps in their order: a few threads read pieces and work on them, this one writes them.

    A piece of a weighted sum is in memory as its output, and block by block as its inputs; others with all that they
    need. All together take at most `limit` bytes.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        limit: int,
        reader: Reader,
        output: OutputDirectory,
        tracer: Tracer,
        progress: ProgressSink,
        *,
        allow_nonfinite: bool,
        keeps_cache: bool,
    ) -> None:
        self._queue = alternating(steps, limit)
        self._reader = reader
        self._output = output
        self._tracer = tracer
        self._progress = progress
        self._allow_nonfinite = allow_nonfinite
        self._keeps_cache = keeps_cache
        self._log = StepLog()
        self._reading = 0  # nanoseconds, added up over threads
        self._room_bytes = max((slot.memory.output for slot in self._queue), default=0)
        working = max((_working_bytes(slot) for slot in self._queue), default=0)
        limit -= max((known_bytes(slot) for slot in self._queue), default=0)
        threads = max(1, min(env.threads(), READ_THREADS, limit // max(1, self._room_bytes + working)))
        count, nbytes = waiting(self._queue)
        self._most = threads + max(0, min(count, (limit - threads * (self._room_bytes + working)) // max(1, nbytes)))
        self._line: deque[tuple[Slot, Array | None, Future[_Done]]] = deque()  # being worked on, or waiting for that
        self._rooms: list[Array] = []  # that nobody uses
        self._used: dict[str, str] = {}
        self._use_lock = Lock()
        self._passes = RawPasses(reader, self._use)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pymerge-combine")

    @property
    def backends(self) -> dict[str, str]:
        """What computed each op."""
        return dict(self._used)

    def _use(self, op: str) -> None:
        """Note and log what computes an op. By any thread."""
        with self._use_lock:
            if op in self._used:
                return
            self._used[op] = "native"
            text = f"{op}: backend native ({_REASON})"
            event("backend_chosen", text, op=op, backend="native", reason=_REASON)

    @property
    def times(self) -> Times:
        waited, busy = self._tracer.seconds("wait for inputs"), self._tracer.seconds("combine")
        share = min(1.0, self._reading / 1e9 / busy) if busy else 0.0
        return Times(waited * share, waited * (1.0 - share), self._tracer.seconds("write"))

    def run(self) -> None:
        """Work through the queue. The first exception of any thread ends it; where memory ran out, the second one."""
        line = self._line
        try:
            for slot in self._queue:
                while len(line) >= self._most or any(_comes_after(slot, earlier) for earlier, _, _ in line):
                    self._finish(*line.popleft())
                if can_take(slot.step):
                    self._passes.starts(slot)
                room = self._take_room(slot) if slot.merges else None
                for entry in slot.step.inputs if slot.reads else ():
                    self._reader.announce(entry, slot.piece.start, slot.piece.stop)
                line.append((slot, room, self._threads.submit(self._work, slot, room)))
            while line:
                self._finish(*line.popleft())
        finally:
            self._threads.shutdown(cancel_futures=True)

    def _take_room(self, slot: Slot) -> Array:
        """Memory for an output; if there is no more, that of an earlier one."""
        try:
            return self._rooms.pop() if self._rooms else Array.mapped(self._room_bytes)
        except MemoryError as error:
            self._slow_down(slot, error)
        while self._line:
            self._finish(*self._line.popleft())
        self._passes.free()
        try:
            return self._rooms.pop() if self._rooms else Array.mapped(self._room_bytes)
        except MemoryError as error:
            raise _out_of_memory(slot.step, error) from error

    def _result(self, slot: Slot, room: Array | None, working: Future[_Done]) -> _Done:
        """What a thread has to say of a piece; where memory ran out, once more with nothing else at work."""
        try:
            return working.result()
        except MemoryError as error:
            self._slow_down(slot, error)
        wait([future for _, _, future in self._line])
        self._passes.free()
        try:
            return self._work(slot, room)
        except MemoryError as error:
            raise _out_of_memory(slot.step, error) from error

    def _slow_down(self, slot: Slot, error: MemoryError) -> None:
        """From now on one piece after another: the limit was too high for what the machine has."""
        text = f"{slot.step.name}: out of memory ({error}); once more, and on with one piece at a time"
        event("out_of_memory", text, level=WARNING, tensor=slot.step.name)
        self._most = 1

    def _finish(self, slot: Slot, room: Array | None, working: Future[_Done]) -> None:
        """Write a piece, or note what was seen of it, when its turn has come."""
        name, nbytes = slot.step.name, slot.memory.output
        self._log.begins(slot)
        self._progress.tensor(name)
        with self._tracer.span("step", name):
            with self._tracer.span("wait for inputs", name):
                done = self._result(slot, room, working)
            self._reading += done.reading
            if can_take(slot.step):
                self._passes.take(slot, done.seen)
            if room is not None:
                with self._tracer.span("write", name, nbytes):
                    self._output.write(name, room.bytes[:nbytes])
                self._rooms.append(room)
        self._progress.advance(nbytes)
        self._log.ends(slot)

    def _work(self, slot: Slot, room: Array | None) -> _Done:
        """Read a piece, and combine, reduce or merge it. By one of the threads."""
        step, piece = slot.step, slot.piece
        nbytes = sum(math.prod(piece.shape) * ITEM_SIZES[dtype] for dtype in _dtypes(step))
        with self._tracer.span("combine", step.name, nbytes):
            seen = None
            if can_take(step):
                out = 0 if room is None else room.address
                seen, reading, finite = self._passes.work(slot, out, check_inputs=not self._allow_nonfinite)
            else:
                assert room is not None  # its only pass merges
                reading, finite = self._fill(step, piece, room, slot.memory.output)
            if not finite and not self._allow_nonfinite:
                self._raise_nonfinite(step, piece)
            if slot.reads_last and not self._keeps_cache:
                for entry in step.inputs:
                    self._reader.release(entry, piece.start, piece.stop)
        if slot.reads:
            self._progress.advance(nbytes)
        return _Done(reading, seen)

    def _fill(self, step: Step, piece: Piece, room: Array, nbytes: int) -> tuple[int, bool]:
        """Put the merged piece into `room`; returns nanoseconds of reading, and whether all is finite."""
        combination, inputs, numel = step.action.combination, step.inputs, math.prod(piece.shape)
        assert combination is not None
        if not combination.weights and inputs[0].dtype == step.dtype:
            began = time.perf_counter_ns()
            self._reader.read_bytes_into(inputs[0], room.bytes[:nbytes], piece.start, piece.stop)
            reading = time.perf_counter_ns() - began
            return reading, step.dtype not in NATIVE or native.is_finite(room.address, step.dtype, numel)
        with self._reader.places(inputs, piece.start, piece.stop) as places:
            files = [FileTensor(*place, entry.dtype) for place, entry in zip(places, inputs, strict=True)]
            has_base = combination.on_base or not combination.weights
            if combination.weights:
                self._use("combine")
            done = native.combine_files(
                room.address,
                step.dtype,
                numel,
                files[0] if has_base else None,
                files[1:] if has_base else files,
                combination.weights,
                combination.divisor,
                block=BLOCK_ELEMENTS,
                check_inputs=not (self._allow_nonfinite or step.action.shows_nonfinite),
            )
            if done.failed >= 0:
                raise failed_read(inputs[done.failed], done.errno, done.offset)
        return done.reading, done.finite

    def _raise_nonfinite(self, step: Step, piece: Piece) -> None:
        """Raise NonFiniteError, which names file and tensor if an input holds NaN or infinity."""
        from pymerge.checkpoint.finite import check_finite, overflow

        for entry in step.inputs:
            check_finite(entry, piece.start, self._reader.read(entry, piece.start, piece.stop))
        raise overflow(step.name, step.dtype)


class _Done(NamedTuple):
    """What a thread has to say of a piece."""

    reading: int  # nanoseconds
    seen: Any  # by a pass that does not merge


def _comes_after(slot: Slot, earlier: Slot) -> bool:
    """Whether a piece is worked on by what another one tells of its tensor."""
    return slot.step is earlier.step and slot.number > earlier.number


def _working_bytes(slot: Slot) -> int:
    """Memory for the inputs of one piece, and what is computed from them beside the output."""
    if can_take(slot.step):
        return working_bytes(slot)
    return min(BLOCK_ELEMENTS, math.prod(slot.piece.shape)) * sum(ITEM_SIZES[dtype] for dtype in _dtypes(slot.step))


def _out_of_memory(step: Step, error: MemoryError) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{step.name}: {step.action.label} runs out of memory on cpu ({error}); end other programs that use it, give a "
        "lower --memory, or use a machine with more; the same command goes on where this one stopped"
    )
