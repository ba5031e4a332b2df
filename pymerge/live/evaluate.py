"""Steps carried out in memory, one tensor at a time: inputs from memory or files, results into memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import NoReturn

import torch
from torch import Tensor

from pymerge.adapters.summed import is_sum
from pymerge.backends.runner import Runner
from pymerge.checkpoint.finite import is_finite, overflow
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.arrays import Array, as_tensor, compute_code
from pymerge.common.blas import one_blas_thread
from pymerge.common.devices import Device, resolve_device
from pymerge.common.dtypes import code_of, torch_dtype, upcast
from pymerge.common.progress import NoProgress
from pymerge.engine.core_solver import CoreSolver
from pymerge.engine.keeping import keep_whole, merge_kept
from pymerge.engine.together import Together
from pymerge.engine.trace import Tracer
from pymerge.engine.whole import Share, merge_whole, reduce_together
from pymerge.engine.worker import Context, check_input, first_line, is_out_of_memory
from pymerge.errors import ArgumentError, BackendError, OutOfMemoryError
from pymerge.live.adapted import adapted
from pymerge.live.bounds import bounded, peak
from pymerge.live.cache import Cache, Place
from pymerge.methods.actions import Action, Combine, InCore, Solve
from pymerge.methods.reduce import Reduce, Reduction, reduced
from pymerge.methods.rows import Rows
from pymerge.ops._op import one_thread
from pymerge.planner import pieces
from pymerge.planner.steps import Step


class Evaluator:
    """Carries out steps where their tensors are, or on one device.

    Args:
        reader: reads what is not in memory.
        device: of all computations; None: of each step, where its base is.
        allow_nonfinite: do not look for NaN and infinity.
        cache: what is known of the steps' inputs; None: nothing is to be remembered.
    """

    def __init__(
        self,
        reader: Reader,
        device: str | torch.device | None,
        backend: str,
        allow_nonfinite: bool,
        cache: Cache | None = None,
    ) -> None:
        self._reader = reader
        self._cache = cache
        self._device = None if device is None else _indexed(resolve_device(device))
        self._backend = backend
        self._allow_nonfinite = allow_nonfinite
        self._runners: dict[str, Runner] = {}
        self.once: dict[TensorEntry, Tensor] = {}  # inputs of the weight that is merged by several parameters
        self._finite: set[Place] = set()  # weights whose inputs have been looked at

    @cached_property
    def _together(self) -> Together:
        """Solvers of layers that are merged by what all of them tell."""
        return Together(self.runner(torch.device("cpu")))

    def device_of(self, step: Step) -> torch.device:
        """Device that a step is computed on."""
        if self._device is not None:
            return self._device
        if isinstance(step.base, HeldEntry):
            return step.base.tensor.device
        held = (entry.tensor.device for entry in step.experts if isinstance(entry, HeldEntry))
        return next(held, torch.device("cpu"))

    def merge(self, step: Step, out: Tensor, share: Share | None = None) -> None:
        """Write the merged tensor to `out`, of the step's shape, in its dtype, on any device.

        Raises:
            NonFiniteError: an input holds NaN or infinity, or the result overflows.
            ArgumentError, BackendError, OutOfMemoryError: the method refuses these values, or cannot run.
        """
        try:
            made = self._merged(step, out, share)
        except ArgumentError as error:
            raise ArgumentError(f"{step.name}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            self._refuse(step, error)
        self.accept(step, made, out)

    def accept(self, step: Step, made: Tensor, out: Tensor) -> None:
        """Look at a result, and put it where it belongs."""
        if not (self._allow_nonfinite or step.infinite or self._is_bounded(step) or is_finite(made)):
            self._blame(step)
        if made.data_ptr() != out.data_ptr() or made.device != out.device:
            out.copy_(made)
        else:  # native code wrote to it, of which autograd knows nothing
            torch.autograd.graph.increment_version(out)

    def reduced(self, steps: Sequence[Step]) -> dict[int, Share]:
        """Shares of steps, by their ids, that are merged by what several together tell."""
        groups: dict[Action, list[Step]] = {}
        for step in sorted(steps, key=lambda step: step.name):
            if isinstance(step.action, Reduce) and step.action.scope == "model" and 0 not in step.shape:
                groups.setdefault(step.action, []).append(step)
        found: dict[int, Share] = {}
        for action, group in groups.items():
            assert isinstance(action, Reduce)
            known = action.on(*(entry.dtype for step in group for entry in step.inputs))
            shares = self._shares(known, group)
            found |= {id(step): share for step, share in zip(group, shares, strict=True)}
        return found

    def _shares(self, action: Reduce, group: Sequence[Step]) -> list[Share]:
        key = (action.basis, tuple(_place(step) for step in group))
        if self._cache is not None and key in self._cache.shares:
            shares = self._cache.shares[key]
            state = shares[0].state.serving(action)
            return [share._replace(state=state) for share in shares]
        sizes, experts = [step.base.numel for step in group], len(group[0].experts)
        run = self.runner(self.device_of(group[0]))
        load = [partial(self.checked_rows, step) for step in group]
        shares = reduce_together(action, run, sizes, experts, load)
        if self._cache is not None:
            self._cache.keep_shares(key, shares)
        return shares

    def has_solved(self, step: Step) -> bool:
        """Whether what a solver keeps of this step's matrices is there."""
        return self._cache is not None and _place(step) in self._cache.kept

    def prepare(self, steps: Sequence[Step], *, solve: bool) -> None:
        """Keep in the cache what there is room for: first what solvers keep (`solve`), then inputs."""
        assert self._cache is not None
        for step in steps if solve else ():
            action = step.action
            if not isinstance(action, Solve) or not self._cache.fits(_kept_bytes(step)) or _kept_bytes(step) == 0:
                continue
            try:
                rows = self.checked_rows(step)
                kept = keep_whole(action, step.role, self.runner(self.device_of(step)), rows)
            except ArgumentError as error:
                raise ArgumentError(f"{step.name}: {error}") from error
            except (MemoryError, RuntimeError) as error:
                self._refuse(step, error)
            if kept is not None:
                self._cache.keep_solved(_place(step), kept)
        for step in steps:
            if isinstance(step.action, InCore) or any(is_sum(entry) for entry in step.inputs):
                continue  # factors are read again: they are small
            solved = _place(step) in self._cache.kept
            for entry in (step.base,) if solved else step.inputs:
                device = self.device_of(step)
                if not self._is_there(entry, device) and self._cache.fits(entry.nbytes):
                    self._cache.keep_input(entry, self.input_of(step, entry, device))

    def _merged(self, step: Step, out: Tensor, share: Share | None) -> Tensor:
        action, run = step.action, self.runner(self.device_of(step))
        if isinstance(action, InCore):
            return self._core(step)
        if self._cache is not None and isinstance(action, Solve) and (kept := self._cache.kept.get(_place(step))):
            return merge_kept(kept, action, step.role, self.load(step.base, self.device_of(step)), step.dtype)
        rows = self.checked_rows(step, out)
        if self._cache is not None and share is None and isinstance(action, Reduce):
            return as_tensor(self._reduced(step, action, run, rows).merge(run, rows))
        return merge_whole(action, step.role, run, rows, share)

    def _reduced(self, step: Step, action: Reduce, run: Runner, rows: Rows) -> Reduction:
        """The state of a tensor that is reduced: one that is kept, if it can serve this action."""
        assert self._cache is not None
        action = action.on(compute_code(rows.base, *rows.experts))
        basis, place = action.basis, _place(step)
        if place in self._cache.states and self._cache.states[place][0] == basis:
            return self._cache.states[place][1].serving(action)
        state = reduced(action, run, rows)
        self._cache.keep_state(place, basis, state)
        return state

    def _core(self, step: Step) -> Tensor:
        """A weight that is solved by its factors, range of rows by range of rows, as files are."""
        context = Context(
            self.runner(torch.device("cpu")), self._reader, Tracer(None), NoProgress(), self._allow_nonfinite, True
        )
        solver = CoreSolver(context, self._together)
        base = self.load(step.base, torch.device("cpu"))
        made = torch.empty(step.shape, dtype=torch_dtype(step.dtype))
        with one_thread(), one_blas_thread():
            for piece in step.pieces:
                rows = slice(piece.start, piece.stop)
                solver.merge(step, piece.start, Array.of(base[rows].contiguous()), Array.of(made[rows]))
        return made

    def checked_rows(self, step: Step, out: Tensor | None = None) -> Rows:
        """All rows of a step on its device; of inputs that no result may show, looked at once."""
        device = self.device_of(step)
        inputs = [self.input_of(step, entry, device) for entry in step.inputs]
        self._look_at(step, inputs)
        base, experts = (inputs[0], inputs[1:]) if step.reads_base else (inputs[0], inputs)
        return Rows(base, experts, step.dtype, out=None if out is None else _room(step, out, inputs))

    def _look_at(self, step: Step, inputs: Sequence[Tensor]) -> None:
        """Look for NaN and infinity once in all inputs that no result may show, and for what bounds results."""
        place, cache = _place(step), self._cache
        if self._allow_nonfinite or place in self._finite:
            return
        sums = isinstance(step.action, Combine) and bool(step.action.weights)
        bounds = cache is not None and sums and not any(map(is_sum, step.inputs))
        if bounds or isinstance(step.action, Reduce) or not step.action.shows_nonfinite:
            for entry, tensor in zip(step.inputs, inputs, strict=True):
                check_input(self._reader, entry, 0, tensor)
            self._finite.add(place)
        if cache is not None and bounds:
            cache.peaks[place] = tuple(map(peak, inputs))

    def _is_bounded(self, step: Step) -> bool:
        return self._cache is not None and bounded(step, self._cache.peaks.get(_place(step), ()))

    def _is_there(self, entry: TensorEntry, device: torch.device) -> bool:
        return isinstance(entry, HeldEntry) and entry.tensor.device == device

    def input_of(self, step: Step, entry: TensorEntry, device: torch.device) -> Tensor:
        """An input of a step, as the worker that merges files would have it."""
        native = device.type == "cpu" and self._backend in ("auto", "native")
        kept = entry in self.once or (self._cache is not None and (entry, device) in self._cache.inputs)
        if native and not kept:
            load = partial(self.load, device=device)
            if (made := adapted(step, entry, self._reader, self.runner(device), load)) is not None:
                return made
        return self.load(entry, device)

    def load(self, entry: TensorEntry, device: torch.device) -> Tensor:
        """A tensor on a device: in the memory of who holds it, if it is there."""
        if self._is_there(entry, device):
            assert isinstance(entry, HeldEntry)
            return upcast(entry.tensor)
        if entry in self.once:
            return self.once[entry]
        if self._cache is not None and (kept := self._cache.inputs.get((entry, device))) is not None:
            return kept
        tensor = entry.tensor if isinstance(entry, HeldEntry) else self._reader.read(entry)
        return upcast(tensor).to(device)

    def runner(self, device: torch.device) -> Runner:
        """Runner of ops on a device."""
        name = str(device)
        if name not in self._runners:
            self._runners[name] = Runner(self._backend, name)
        return self._runners[name]

    def _blame(self, step: Step) -> NoReturn:
        """Raise NonFiniteError about an input that is not finite, or else about the result."""
        for entry in step.inputs:
            check_input(self._reader, entry, 0, self.load(entry, torch.device("cpu")))
        raise overflow(step.name, step.dtype)

    def _refuse(self, step: Step, error: BaseException) -> NoReturn:
        where = self.device_of(step)
        if is_out_of_memory(error):
            remedy = "pass device='cpu'" if where.type == "cuda" else "free memory, or use a machine with more"
            raise OutOfMemoryError(
                f"{step.name}: {step.action.label} on {list(step.shape)} runs out of memory on {where} "
                f"({first_line(error)}); {remedy}"
            ) from error
        raise BackendError(
            f"{step.name}: {step.action.label} failed on {where} ({first_line(error)}); try backend='reference', and "
            "report this"
        ) from error


def _indexed(device: Device) -> torch.device:
    """The device as tensors on it name it."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return torch.device(device.type, index) if index is not None else torch.device(device.type)


def _place(step: Step) -> Place:
    return step.name, step.offset


def _kept_bytes(step: Step) -> int:
    """Bytes of what a solver keeps of all matrices of a weight."""
    matrices = step.role.parts * (step.shape[0] if step.role.stacked else 1)
    worked = pieces.worked_shape(step.role, step.action, step.shape)
    return matrices * step.action.kept_bytes(worked, len(step.experts)) if isinstance(step.action, Solve) else 0


def _room(step: Step, out: Tensor, inputs: Sequence[Tensor]) -> Tensor | None:
    """`out`, if a result can be written to it at once: contiguous, of the right kind, and no input is in its memory."""
    if not out.is_contiguous() or code_of(out.dtype) != step.dtype or out.numel() == 0:
        return None
    if any(out.device != tensor.device for tensor in inputs):
        return None
    storage = out.untyped_storage().data_ptr()
    return None if any(tensor.untyped_storage().data_ptr() == storage for tensor in inputs) else out
